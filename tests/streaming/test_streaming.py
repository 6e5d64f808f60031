"""Pruning from disk to disk gives what pruning in memory gives, whatever cuts it."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from optimum_eggs import EGGSConfig, EGGSPruner, folders
from optimum_eggs.errors import CheckpointError, ConfigError, ModelError, NumericalError, OutputError
from optimum_eggs.folders import claimed, new_folder
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.streaming import prune as streaming
from optimum_eggs.streaming import prune_checkpoint, source

SIZE = {"num_samples": 8, "seq_len": 16, "band": 8, "batch_size": 2}
KINDS = {
    "fast": {},
    "best": {"preset": "best", "block_tuning": 4},
    "corrected": {"preset": "best", "block_tuning": 4, "error_correction": 0.5},
    "alone": {"error_correction": 0.0},
    "int8": {"values": "int8", "head": "int8", "ignored": "int8", "ignore": ["lm_head", "v_proj"]},
    "int4": {"preset": "best", "block_tuning": 4, "values": "int4", "head": "int8"},
    "turned": {"preset": "best", "block_tuning": 4, "rotation": True},
    "written": {"preset": "best", "block_tuning": 4, "generated_samples": 5},
}


# Lists of hidden states that a run over so many blocks makes: what a block gets, and gets in the dense model where that
# is followed; and what attention gave, there too where errors are corrected, and again where rounding passes them on.
STORES = {
    "fast": lambda blocks: 2 + 2 * blocks,
    "best": lambda blocks: 2 + blocks,
    "corrected": lambda blocks: 2 + 2 * blocks,
    "alone": lambda blocks: 1 + blocks,
    "int8": lambda blocks: 2 + 2 * blocks,
    "int4": lambda blocks: 2 + 2 * blocks,
    "written": lambda blocks: 2 + blocks,
    "turned": lambda blocks: 3 + blocks,  # of the dense model, that the rotation is chosen by
}


def config_for(text_file, **values):
    return EGGSConfig("2:4", calibration=str(text_file), **SIZE | values)


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


def without_time(folder):
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key != "measurements"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    """A model of five blocks, tied, in bfloat16."""
    folder = tmp_path_factory.mktemp("deep") / "llama"
    kind, config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    kind._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, deep, text_file):
    """What runs that were not cut give, by kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, values in KINDS.items():
        prune_checkpoint(deep, root / kind, config_for(text_file, **values), progress=False)
    return root


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_every_architecture_is_the_same_bit_for_bit(name, tokenizer, text_file, tmp_path):
    tiny.make_model(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = config_for(text_file)
    pruner = EGGSPruner.from_pretrained(tmp_path / "dense")
    pruner.prune(config, progress=False)
    pruner.save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config, progress=False)
    same_bits(tensors(tmp_path / "memory"), tensors(tmp_path / "disk"))
    assert {f.name for f in (tmp_path / "memory").iterdir()} == {f.name for f in (tmp_path / "disk").iterdir()}
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "memory" / file).read_text() == (tmp_path / "disk" / file).read_text()
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "out") for name in ("memory", "disk")]
    assert 'from_pretrained("out")' in cards[0]
    assert cards[0] == cards[1]
    assert without_time(tmp_path / "memory") == without_time(tmp_path / "disk")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_the_same_bit_for_bit(kind, deep, whole, text_file, tmp_path):
    pruner = EGGSPruner.from_pretrained(deep)
    pruner.prune(config_for(text_file, **KINDS[kind]), progress=False)
    pruner.save_pretrained(tmp_path / "memory")
    same_bits(tensors(tmp_path / "memory"), tensors(whole / kind))
    assert without_time(tmp_path / "memory") == without_time(whole / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_hidden_states_on_disk_make_no_difference(kind, deep, whole, text_file, tmp_path, monkeypatch):
    made = []

    class Counted(streaming.StatesOnDisk):
        def __init__(self, parent):
            made.append(parent)
            super().__init__(parent)

    monkeypatch.setattr(streaming, "StatesOnDisk", Counted)
    config = config_for(text_file, **KINDS[kind])
    prune_checkpoint(deep, tmp_path / "out", config, memory_budget="1KiB", progress=False)
    assert len(made) == STORES[kind](5)
    same_bits(tensors(tmp_path / "out"), tensors(whole / kind))
    made.clear()
    prune_checkpoint(deep, tmp_path / "again", config, memory_budget="1GiB", progress=False)
    assert not made


@pytest.mark.parametrize(("share", "held"), [(0, 16), (0.5, 24)])
def test_short_windows_count_against_the_memory_budget(share, held, deep, text_file, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(streaming, "StatesOnDisk", lambda parent: made.append(parent) or [])
    config = config_for(text_file, preset="wanda", short_share=share)
    dense = AutoModelForCausalLM.from_pretrained(deep)
    needed = held * SIZE["seq_len"] * dense.config.hidden_size * dense.dtype.itemsize
    for name, budget in {"enough": needed, "less": needed - 1}.items():
        assert not made
        prune_checkpoint(deep, tmp_path / name, config, memory_budget=budget, progress=False)
    assert made


def test_dtypes_and_shards(deep, text_file, tmp_path):
    config = config_for(text_file)
    pruner = EGGSPruner.from_pretrained(deep, dtype="float32")
    pruner.prune(config, progress=False)
    pruner.save_pretrained(tmp_path / "memory", dtype="float16")
    options = {"dtype": "float32", "save_dtype": "float16", "max_shard_size": "20KB", "progress": False}
    prune_checkpoint(deep, tmp_path / "disk", config, **options)
    same_bits(tensors(tmp_path / "memory"), tensors(tmp_path / "disk"))
    assert (tmp_path / "memory" / "config.json").read_text() == (tmp_path / "disk" / "config.json").read_text()
    files = list((tmp_path / "disk").glob("model-*.safetensors"))
    assert len(files) > 5
    assert max(sum(value.nbytes for value in load_file(file).values()) for file in files) <= 20_000
    assert inspect_checkpoint(tmp_path / "disk").ok
    ids = torch.arange(8)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("memory", "disk")]
    with torch.no_grad():
        assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)


def test_a_sharded_checkpoint_is_read(deep, whole, text_file, tmp_path):
    AutoModelForCausalLM.from_pretrained(deep).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    for file in deep.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", config_for(text_file), progress=False)
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))


def cut_after(monkeypatch, blocks, error):
    """Make a run end with `error` when that many blocks are finished."""
    keep = streaming._Keeper.keep

    def keep_or_end(self, block, index, result):
        if index == blocks:
            raise error
        keep(self, block, index, result)

    monkeypatch.setattr(streaming._Keeper, "keep", keep_or_end)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_a_run_that_is_interrupted_goes_on(kind, blocks, deep, whole, text_file, tmp_path, monkeypatch):
    config = config_for(text_file, **KINDS[kind])
    with monkeypatch.context() as patch:
        cut_after(patch, blocks, KeyboardInterrupt())
        began = time.perf_counter()
        with pytest.raises(KeyboardInterrupt, match=f"{blocks} of 5 blocks are finished; the same command goes on"):
            prune_checkpoint(deep, tmp_path / "out", config, progress=False)
        first = time.perf_counter() - began
    assert not (tmp_path / "out").exists()
    began = time.perf_counter()
    report = prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    took = report.measurements
    assert took["blocks_of_earlier_runs"] == blocks
    assert 0 < took["seconds"] < time.perf_counter() - began
    assert (0 < took["seconds_of_earlier_runs"] < first) is (blocks > 0)
    assert (took["peak_rss_of_earlier_runs"] > 2**20) is (blocks > 0)
    same_bits(tensors(tmp_path / "out"), tensors(whole / kind))
    assert without_time(tmp_path / "out") == without_time(whole / kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rotation_that_is_chosen_is_kept_before_a_block_is(deep, whole, text_file, tmp_path, monkeypatch):
    config = config_for(text_file, **KINDS["turned"])
    with monkeypatch.context() as patch:
        cut_after(patch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    monkeypatch.setattr(streaming, "choose_turn", None)
    prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    same_bits(tensors(tmp_path / "out"), tensors(whole / "turned"))


def test_windows_that_were_written_are_kept_before_a_block_is(deep, whole, text_file, tmp_path, monkeypatch, caplog):
    config = config_for(text_file, **KINDS["written"])
    for _ in range(2):  # the second run writes them again
        with monkeypatch.context() as patch:
            cut_after(patch, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prune_checkpoint(deep, tmp_path / "out", config, progress=False)
        (kept,) = tmp_path.rglob("generated.json")
        good = kept.read_bytes()
        kept.write_bytes(good[:-100])
    assert "generated.json: cannot be read" in caplog.text
    kept.write_bytes(good)
    monkeypatch.setattr(streaming, "generated_windows", None)
    prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    same_bits(tensors(tmp_path / "out"), tensors(whole / "written"))


def test_an_interrupt_while_windows_are_written_leaves_nothing_half_done(deep, whole, text_file, tmp_path, monkeypatch):
    config = config_for(text_file, **KINDS["written"])
    pruner = EGGSPruner.from_pretrained(deep)
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    recommended = pruner.model.generation_config
    steps = []

    def tick(*args, **options):
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return torch.zeros(len(args[1]), dtype=torch.bool)

    with monkeypatch.context() as patch:
        patch.setattr("optimum_eggs.engine.generate._Teller.__call__", tick)
        with pytest.raises(KeyboardInterrupt):
            pruner.prune(config, progress=False)
        steps.clear()
        with pytest.raises(KeyboardInterrupt, match="0 of 5 blocks are finished"):
            prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    assert not list(tmp_path.iterdir())
    assert pruner.model.generation_config is recommended
    same_bits(before, pruner.model.state_dict())
    pruner.prune(config, progress=False)
    pruner.save_pretrained(tmp_path / "memory")
    prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    for name in ("memory", "out"):
        same_bits(tensors(tmp_path / name), tensors(whole / "written"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda value: value.fill_(float("nan")), NumericalError, "layers.3.mlp.up_proj.weight"),
        (lambda value: value[:, :-4].contiguous(), CheckpointError, "does not fit the model"),
    ],
)
def test_a_bad_block_is_named_while_windows_are_written(change, error, message, deep, text_file, tmp_path):
    shutil.copytree(deep, tmp_path / "dense")
    values = tensors(deep)
    name = "model.layers.3.mlp.up_proj.weight"
    save_file(values | {name: change(values[name])}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        prune_checkpoint(
            tmp_path / "dense", tmp_path / "out", config_for(text_file, **KINDS["written"]), progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_blocks_of_a_rotation_that_is_lost_are_never_gone_on_from(
    deep, whole, text_file, tmp_path, monkeypatch, caplog
):
    config = config_for(text_file, **KINDS["turned"])
    for blocks in (2, 0):  # the second run chooses another, and is cut before it has a block
        with monkeypatch.context() as patch:
            cut_after(patch, blocks, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prune_checkpoint(deep, tmp_path / "out", config, progress=False)
        if blocks:
            (kept,) = tmp_path.rglob("rotation.safetensors")
            kept.write_bytes(kept.read_bytes()[:-100])
    assert "rotation.safetensors: cannot be read" in caplog.text
    report = prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 0
    same_bits(tensors(tmp_path / "out"), tensors(whole / "turned"))


def test_a_head_of_its_own_is_turned_as_in_memory(text_file, tokenizer, tmp_path):
    model = tiny.make_model("llama-untied", dtype=torch.bfloat16)
    model.model.norm.weight.data += torch.linspace(-0.5, 0.5, 32)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = config_for(text_file, rotation=True)
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config, progress=False)
    pruner = EGGSPruner(model, tokenizer)
    pruner.prune(config, progress=False)
    pruner.save_pretrained(tmp_path / "memory")
    same_bits(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert tensors(tmp_path / "disk")["model.norm.weight"].eq(1).all()


@pytest.mark.parametrize("function", ["save_file", "load_file"])
@pytest.mark.parametrize("call", [1, 3])
def test_a_full_disk_names_the_remedy_and_the_run_goes_on(
    function, call, deep, whole, text_file, tmp_path, monkeypatch
):
    calls = []
    real = getattr(streaming, function)

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, function, full)
        with pytest.raises(OutputError, match=r"No space left on device.*the same command goes on"):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert not (tmp_path / "out").exists()
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == (call - 1 if function == "save_file" else 5)
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))


def test_a_finished_block_that_was_damaged_is_pruned_again(deep, whole, text_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    (file,) = (tmp_path / ".out.unfinished").glob("*/block-00002.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 2
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))


def test_what_another_run_has_left_is_not_in_the_way(deep, whole, text_file, tmp_path, monkeypatch, caplog):
    def cut(model, config, **options):
        with monkeypatch.context() as patch:
            cut_after(patch, 2, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt, match="2 of 5 blocks are finished"):
                prune_checkpoint(model, tmp_path / "out", config, progress=False, **options)

    config = config_for(text_file)
    cut(deep, config)
    other_text = tmp_path / "other.txt"
    other_text.write_text(tiny.make_text(4000, seed=1))
    other_model = shutil.copytree(deep, tmp_path / "model")
    save_file(
        {name: value * 2 for name, value in tensors(deep).items()}, other_model / "model.safetensors", {"format": "pt"}
    )
    for model, changed, options, message in (  # what was cut last is named
        (deep, config_for(text_file, refit_steps=3), {}, "config.refit_steps was 10 and is now 3"),
        (deep, config_for(other_text, refit_steps=3), {}, "the calibration text gives other tokens"),
        (deep, config_for(other_text, refit_steps=3), {"dtype": "float32"}, "dtype was 'torch.bfloat16' and is now"),
        (other_model, config_for(other_text, refit_steps=3), {"dtype": "float32"}, "file model.safetensors changed"),
    ):
        caplog.clear()
        cut(model, changed, **options)
        assert message in caplog.text
        assert "this one starts from the beginning" in caplog.text
    caplog.clear()
    report = prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 2
    assert not caplog.text
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other.txt", "out"]


def test_overwriting_removes_what_other_runs_have_left(deep, text_file, tmp_path, monkeypatch):
    for steps in (3, 4):
        with monkeypatch.context() as patch:
            cut_after(patch, 1, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prune_checkpoint(deep, tmp_path / "out", config_for(text_file, refit_steps=steps), overwrite=True)
        assert len(list((tmp_path / ".out.unfinished").glob("run-*"))) == 1


def test_overwriting_goes_on_too_where_it_was_cut(deep, whole, text_file, tmp_path, monkeypatch):
    with new_folder(tmp_path / "out") as made:
        (made / "config.json").write_text("{}")
        (made / "README.md").write_text("# out\n\nText of my own.\n")
    with monkeypatch.context() as patch:
        cut_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="2 of 5 blocks are finished"):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), overwrite=True, progress=False)
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), overwrite=True, progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 2
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))
    assert "Text of my own." in (tmp_path / "out" / "README.md").read_text()


def test_an_empty_folder_is_filled_and_the_unfinished_run_is_in_it(deep, whole, text_file, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        cut_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="2 of 5 blocks are finished"):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert [path.name for path in tmp_path.rglob(".*")] == [".unfinished"]
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 2
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))
    assert not list(tmp_path.rglob(".*"))


def test_space_is_asked_for_before_the_work(deep, whole, text_file, tmp_path, monkeypatch):
    free = []
    monkeypatch.setattr("optimum_eggs.folders.shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    sizes = {name: value.nbytes for name, value in tensors(whole / "fast").items()}
    needs = sum(size * (2 if ".layers." in name else 1) for name, size in sizes.items())
    free[:] = [needs - 1]
    with pytest.raises(OutputError, match=r"will be written, and .* are free there"):
        prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert not list(tmp_path.iterdir())
    free[:] = [needs]
    prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)


def test_the_model_is_not_replaced(deep, text_file, tmp_path):
    (tmp_path / "link").symlink_to(deep)
    for out in (deep, tmp_path / "link"):
        with pytest.raises(OutputError, match="itself, which is read"):
            prune_checkpoint(deep, out, config_for(text_file), overwrite=True)


def test_an_interrupt_while_the_output_is_put_together_says_what_is_finished(deep, text_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt, match="5 of 5 blocks are finished; the same command goes on"):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 5


def test_an_interrupt_when_the_output_is_in_place_says_that(deep, text_file, tmp_path, monkeypatch):
    exchange = folders._exchange
    monkeypatch.setattr(folders, "_exchange", lambda *paths: (exchange(*paths), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt, match=f"^{re.escape(str(tmp_path / 'out'))} is whole and in place$"):
        prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_put_at_the_output_during_a_run_stays(deep, text_file, tmp_path, monkeypatch):
    assemble = streaming._assemble

    def slow(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        assemble(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_assemble", slow)
        with pytest.raises(OutputError, match="exists and is not empty"):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 5


def test_a_journal_that_cannot_be_read_counts_as_none(deep, whole, text_file, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        cut_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    (journal,) = (tmp_path / ".out.unfinished").glob("*/journal.json")
    journal.write_text('[{"file": "block-00000.safetensors"}]')
    report = prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)
    assert report.measurements["blocks_of_earlier_runs"] == 0
    assert "cannot be read ('sha256'), so the run starts from the beginning" in caplog.text
    same_bits(tensors(tmp_path / "out"), tensors(whole / "fast"))


def test_blocks_with_buffers_that_no_file_holds(tokenizer, text_file, tmp_path):
    torch.manual_seed(0)
    small = GPTNeoConfig(
        vocab_size=256, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    model = GPTNeoForCausalLM(small)
    assert any(".h." in name for name, _ in model.named_non_persistent_buffers())
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = config_for(text_file)
    pruner = EGGSPruner.from_pretrained(tmp_path / "dense")
    pruner.prune(config, progress=False)
    pruner.save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config, progress=False)
    same_bits(tensors(tmp_path / "memory"), tensors(tmp_path / "disk"))


def test_files_that_cannot_be_read_any_more_are_not_taken_for_a_full_disk(deep, text_file, tmp_path, monkeypatch):
    def gone(*arguments, **keywords):
        raise FileNotFoundError(2, "No such file or directory", "model.safetensors")

    monkeypatch.setattr("optimum_eggs.streaming.source.stored_tensors", gone)
    with pytest.raises(CheckpointError, match=r"cannot be read .*model\.safetensors"):
        prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)


def test_a_second_process_is_refused(deep, text_file, tmp_path):
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match=rf"process {os.getpid()} of .* is writing to it"):
        prune_checkpoint(deep, tmp_path / "out", config_for(text_file), progress=False)


def test_bad_models_are_refused_before_anything_is_written(deep, packed_folder, text_file, tmp_path):
    def changed(change):
        folder = shutil.copytree(deep, tmp_path / f"model-{len(list(tmp_path.iterdir()))}")
        values = tensors(folder)
        change(values)
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder

    name = "model.layers.3.mlp.up_proj.weight"
    for folder, error, message in (
        (changed(lambda v: v.pop(name)), CheckpointError, f"{name} is missing"),
        (changed(lambda v: v.pop("model.embed_tokens.weight")), CheckpointError, "embed_tokens.weight is missing"),
        (packed_folder, ModelError, "is packed already"),
        (tmp_path / "nothing", ModelError, "nothing: there is no such folder"),
    ):
        with pytest.raises(error, match=message):
            prune_checkpoint(folder, tmp_path / "out", config_for(text_file), progress=False)
        assert not list(tmp_path.glob("*out*"))
    for change, error, message in (
        (lambda v: v[name].fill_(float("nan")), NumericalError, name),
        (lambda v: v.update({name: v[name][:, :-4].contiguous()}), CheckpointError, name),
    ):
        with pytest.raises(error, match=message):
            prune_checkpoint(changed(change), tmp_path / "out", config_for(text_file), progress=False)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / ".out.unfinished")
    with pytest.raises(ConfigError, match="memory_budget='8 apples' is no size"):
        prune_checkpoint(deep, tmp_path / "out", config_for(text_file), memory_budget="8 apples")
    with pytest.raises(ConfigError, match="device='elsewhere' cannot be used"):
        prune_checkpoint(deep, tmp_path / "out", config_for(text_file), device="elsewhere")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("generated", [0, 3])
def test_only_a_block_is_in_memory(generated, deep, text_file, tmp_path, monkeypatch):
    seen = []
    load = streaming.DenseSource._load

    def watched(self, *which):
        load(self, *which)
        seen.append(sum(value.nbytes for value in self.model.state_dict().values() if not value.is_meta))

    monkeypatch.setattr(streaming.DenseSource, "_load", watched)
    monkeypatch.setattr(source, "wave_bytes", lambda device: 0)
    config = config_for(text_file, generated_samples=generated)
    prune_checkpoint(deep, tmp_path / "out", config, progress=False)
    values = tensors(deep)
    block = sum(value.nbytes for name, value in values.items() if ".layers.0." in name)
    outside = sum(value.nbytes for name, value in values.items() if ".layers." not in name)
    assert max(seen) <= block + 2 * outside  # the head is tied, and listed twice
    assert sum(0 < size <= block for size in seen) >= 5


def test_the_first_blocks_stay_while_windows_are_written(deep, monkeypatch):
    dense = source.DenseSource(deep, device="cpu")
    block = sum(value.numel() * 2 for value in dense.skeleton(0).parameters())
    loaded, load = [], source.DenseSource._load
    monkeypatch.setattr(source.DenseSource, "_load", lambda self, *which: loaded.append(which[0]) or load(self, *which))
    ids = torch.arange(6).view(2, 3)
    written, options = [], {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    for limit, times in ((0, [3] * 5), (2 * block, [1, 1, 3, 3, 3]), (5 * block, [1] * 5)):
        monkeypatch.setattr(source, "wave_bytes", lambda device, limit=limit: limit)
        loaded.clear()
        written.append(dense.generate(ids, **options))
        assert [loaded.count(index) for index in range(5)] == times
        assert all(value.is_meta for value in dense.model.parameters())
    whole = AutoModelForCausalLM.from_pretrained(deep)
    expected = whole.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert all(torch.equal(each, expected) for each in written)


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer):
    """A model with a head of its own, as large as a block."""
    folder = tmp_path_factory.mktemp("untied") / "llama"
    kind, config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    kind._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_head_of_its_own_is_in_memory_alone(untied, text_file, tmp_path, monkeypatch):
    seen = []
    load = streaming.DenseSource._load

    def watched(self, *which):
        load(self, *which)
        seen.append({name for name, value in self.model.named_parameters() if not value.is_meta})

    monkeypatch.setattr(streaming.DenseSource, "_load", watched)
    config = config_for(text_file)
    prune_checkpoint(untied, tmp_path / "out", config, progress=False)
    assert all(len(names) == 1 or {n for n in names if ".layers." in n} for names in seen if "lm_head.weight" in names)
    assert sum("lm_head.weight" in names for names in seen) == 2  # looked at before the work, and written at the end
    assert not any({"lm_head.weight", "model.embed_tokens.weight"} <= names for names in seen)
    monkeypatch.undo()
    pruner = EGGSPruner.from_pretrained(untied)
    pruner.prune(config, progress=False)
    pruner.save_pretrained(tmp_path / "memory")
    same_bits(tensors(tmp_path / "memory"), tensors(tmp_path / "out"))


def test_a_head_that_is_not_finite_is_found_before_the_work(untied, text_file, tmp_path, monkeypatch):
    folder = shutil.copytree(untied, tmp_path / "model")
    values = tensors(folder)
    values["lm_head.weight"][3, 5] = torch.nan
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("optimum_eggs.engine.prune.prune_block", None)
    with pytest.raises(NumericalError, match=r"lm_head\.weight: the weight holds NaN"):
        prune_checkpoint(folder, tmp_path / "out", config_for(text_file), progress=False)


RUN = """
import json, sys
from optimum_eggs import EGGSConfig
from optimum_eggs.streaming import prune_checkpoint
prune_checkpoint(sys.argv[1], sys.argv[2], EGGSConfig.from_dict(json.loads(sys.argv[3])), progress=False)
"""


@pytest.mark.parametrize("kind", ["fast", pytest.param("best", marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files(kind, deep, whole, forks, text_file, tmp_path):
    kills = int(os.environ.get("OPTIMUM_EGGS_KILLS", "3"))
    told = json.dumps(config_for(text_file, **KINDS[kind]).to_dict() | {"calibration": str(text_file)})
    draw = random.Random(kind)

    def run(seconds):
        began = time.monotonic()
        done = forks.run("-c", RUN, deep, tmp_path / "out", told, timeout=seconds)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, time.monotonic() - began

    status, whole_run = run(300)
    assert status == 0
    killed = 0
    while killed < kills:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        status, _ = run(draw.uniform(0, whole_run))
        while status == -signal.SIGKILL:
            killed += 1
            shutil.rmtree(tmp_path / "out", ignore_errors=True)  # it was killed when its output was in place
            status, _ = run(draw.uniform(0, whole_run) if killed < kills else 300)
        assert status == 0
        for file in (whole / kind).glob("*.safetensors"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "out" / "config.json").read_text() == (whole / kind / "config.json").read_text()
        assert without_time(tmp_path / "out") == without_time(whole / kind)
    leftovers = [path.name for path in Path(tmp_path).iterdir() if path.name != "out"]
    assert not [name for name in leftovers if "unfinished" in name]
