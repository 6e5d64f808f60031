"""Calibration windows that the dense model writes itself."""

import pytest
import tiny
import torch
import transformers as t

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.calibration import InMemoryBlocks, find_block_list
from optimum_eggs.calibration.windows import windows_digest
from optimum_eggs.engine import generate
from optimum_eggs.engine.generate import generated_windows
from optimum_eggs.errors import ConfigError, ModelError, NumericalError, OutOfMemoryError

WINDOWS = tiny.make_windows(4, 80)


def write(model, windows=WINDOWS, count=3, seed=0, **options):
    return generated_windows(
        model, InMemoryBlocks(model, find_block_list(model)), windows, count, seed, progress=False, **options
    )


def pieces(windows, size):
    return {tuple(piece.tolist()) for row in windows for piece in row.unfold(0, size, 1)}


@pytest.mark.parametrize(("tokens", "prompt"), [(80, 32), (64, 32), (40, 20), (3, 1)])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_window_begins_with_tokens_of_the_text(count, tokens, prompt):
    windows = WINDOWS[:, :tokens]
    made = write(tiny.make_model("llama"), windows, count)
    assert made.shape == (count, tokens)
    assert made.dtype == torch.int64
    long = pieces(windows, prompt)
    near = [tuple(row[:prompt].tolist()) in long for row in made]
    assert all(near[: -(-count // 2)])
    assert not any(near[-(-count // 2) :]) or tokens == 3  # of these it is the first token alone
    assert set(made[:, 0].tolist()) <= set(windows.flatten().tolist())
    assert not any(tuple(row[prompt:].tolist()) in pieces(windows, tokens - prompt) for row in made) or tokens == 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2", "mixtral"])
def test_the_seed_decides_alone(name):
    model = tiny.make_model(name).train()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = write(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(write(model), first)
    assert not torch.equal(write(model, seed=1), first)
    assert len(set(map(tuple, first.tolist()))) == 3


def test_it_is_the_distribution_of_the_model_that_is_sampled():
    model = tiny.make_model("llama")
    model.lm_head.weight.data *= 16  # far from uniform
    made = write(model, count=512)
    recommended = t.GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, eos_token_id=2, max_length=7)
    model.generation_config = recommended
    assert torch.equal(write(model, count=512), made)
    made = made[:256]
    assert model.generation_config is recommended
    with torch.no_grad():
        logits = model(made[:, :33]).logits[:, 31].clone()
    logits[:, 2] = -torch.inf
    chance = logits.log_softmax(-1)
    # the mean surprise of what was drawn is the entropy of what it was drawn from
    surprise = -chance.gather(1, made[:, 32:33]).mean()
    entropies = -(chance.exp() * chance.nan_to_num(neginf=0)).sum(-1)
    assert entropies.mean() < 4
    spread = (chance.exp() * (chance.nan_to_num(neginf=0) + entropies[:, None]).square()).sum(-1).mean().sqrt()
    assert abs(surprise - entropies.mean()) < 4 * spread / 256**0.5
    assert not (made[:, 32:] == 2).any()


def test_batches_are_drawn_apart(monkeypatch):
    model = tiny.make_model("llama")
    monkeypatch.setattr(generate, "_TOGETHER", 2)
    made = write(model, WINDOWS[:1, :32], count=9)
    assert made.shape == (9, 32)
    assert len(set(map(tuple, made[:, 16:].tolist()))) == 9


def test_how_long_it_takes_is_told(capsys):
    model = tiny.make_model("llama")
    generated_windows(model, InMemoryBlocks(model, find_block_list(model)), WINDOWS, 3, 0, progress=True)
    told = capsys.readouterr().err
    assert "the dense model writes 3 calibration windows first: about 1 s" in told
    assert "175/175" in told  # 2 x 48 and 79
    write(model)
    assert capsys.readouterr() == ("", "")


def test_a_model_is_pruned_on_both(text_file, dense_folder):
    pruner = EGGSPruner.from_pretrained(dense_folder)
    config = EGGSConfig("2:4", calibration=str(text_file), num_samples=6, generated_samples=4, seq_len=16, seed=5)
    made = []
    original = generate.generated_windows

    def noted(*args, **options):
        made.append((args[2], original(*args, **options)))
        return made[0][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_eggs.engine.prune.generated_windows", noted)
        report = pruner.prune(config, progress=False)
    ((text, written),) = made
    assert len(text) == 6
    assert report.calibration["sha256"] == windows_digest(torch.cat([text, written]))
    assert (report.calibration["windows"], report.calibration["generated"]) == (10, 4)
    assert {layer.tokens for layer in report.layers} == {160}
    assert report.config["generated_samples"] == 4
    assert report.measurements["stages"]["generation"]["seconds"] > 0


def test_who_writes_no_text_is_refused_before_the_work(text_file, tokenizer):
    config = EGGSConfig("2:4", calibration=str(text_file), num_samples=4, generated_samples=4, seq_len=16)
    sizes = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    for model in (tiny.make_model("bert"), t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))):
        with pytest.raises(ModelError, match=r"generated_samples=4: \w+ cannot go on with a text.*generated_samples=0"):
            EGGSPruner(model, tokenizer).prune(config, progress=False)


def test_what_goes_wrong_is_named_and_the_model_stays(text_file, tokenizer):
    model = tiny.make_model("llama-untied")
    model.lm_head.weight.data[0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"num_samples": 4, "generated_samples": 4, "seq_len": 16}
    pruner = EGGSPruner(model, tokenizer)
    with pytest.raises(ModelError, match=r"generated_samples: LlamaForCausalLM cannot write windows .*probability"):
        pruner.prune(EGGSConfig("2:4", calibration=str(text_file), **settings), progress=False)
    now = model.state_dict()
    assert all(torch.equal(value.nan_to_num(), now[name].nan_to_num()) for name, value in before.items())
    model.lm_head.weight.data[0] = 0
    assert pruner.prune(EGGSConfig("2:4", calibration=str(text_file), **settings), progress=False).layers


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (NumericalError("a weight is NaN"), NumericalError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), OutOfMemoryError),
        (ValueError("its cache is unknown"), ModelError),
    ],
)
def test_errors_of_other_kinds_stay_what_they_are(raised, seen, text_file, tokenizer, monkeypatch):
    model = tiny.make_model("llama")

    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(InMemoryBlocks, "generate", fail)
    config = EGGSConfig("2:4", calibration=str(text_file), num_samples=4, generated_samples=4, seq_len=16)
    with pytest.raises(seen, match=str(raised)[-9:]) as caught:
        EGGSPruner(model, tokenizer).prune(config, progress=False)
    assert ("generated_samples=0" in str(caught.value)) is (seen is ModelError)


@pytest.mark.parametrize("value", [-1, 1.5, "8", True])
def test_counts_that_are_none(value):
    with pytest.raises(ConfigError, match="generated_samples"):
        EGGSConfig("2:4", generated_samples=value)
