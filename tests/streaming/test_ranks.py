"""Several processes that prune one checkpoint give what one gives, up to the order of sums, or end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import GramAccumulator
from optimum_eggs.cli.main import main
from optimum_eggs.errors import ConfigError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.packing.pack import unpack_mask
from optimum_eggs.ranks import Ranks
from optimum_eggs.streaming import prune_checkpoint

SIZE = {"num_samples": 16, "seq_len": 32, "band": 8, "batch_size": 4}
KINDS = {
    "fast": {},
    "best": {"preset": "best", "block_tuning": 5},
    "untuned": {"preset": "best", "block_tuning": 0},
    "corrected": {"preset": "best", "block_tuning": 4, "error_correction": 0.5},
    "permuted": {"preset": "ria", "permutation": True},
    "paper": {"preset": "paper", "band": 4},
    "turned": {"preset": "wanda", "rotation": True},
    "written": {"preset": "wanda", "generated_samples": 40},
}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(tiny.make_text(4000))
    (folder / "short.txt").write_text("w1 w2")
    (folder / "other.txt").write_text(tiny.make_text(4000, seed=1))
    for name in ("llama", "qwen3_moe"):
        tiny.make_model(name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def jobs():
    made = {f"{kind}-2": {"model": "llama", "config": SIZE | values} for kind, values in KINDS.items()}
    made["moe-2"] = {"model": "qwen3_moe", "config": SIZE}
    made["tuned-moe-2"] = {"model": "qwen3_moe", "config": SIZE | {"preset": "best", "block_tuning": 4}}
    made["unturned-moe-2"] = {"model": "qwen3_moe", "config": SIZE | {"rotation": "auto"}}
    made["disk-2"] = {"model": "llama", "config": SIZE, "options": {"memory_budget": 0}}
    made["uneven"] = {"model": "llama", "config": SIZE | {"num_samples": 15}}
    made["missing"] = {"model": "llama", "config": SIZE | {"targets": ["nothing"]}}
    made["again"] = {"model": "llama", "config": SIZE}
    # Only the second process fails: the first must hear of it, and both must be in step for the job behind.
    made["short"] = {"model": "llama", "config": SIZE, "of_second": {"text": "short.txt"}}
    made["other"] = {"model": "llama", "config": SIZE, "of_second": {"text": "other.txt"}}
    made["broken"] = {"model": "llama", "config": SIZE, "of_second": {"error": "no solution"}}
    made["raised"] = {"model": "llama", "config": SIZE, "of_second": {"error_once": "it cannot be factorised"}}
    made["behind-2"] = {"model": "llama", "config": SIZE}
    return made


@pytest.fixture(scope="module")
def together(root):
    """All jobs, done by two processes."""
    (root / "jobs.json").write_text(json.dumps(jobs()))
    (root / "again").mkdir()
    (root / "again" / "file").write_text("not ours")
    script = Path(__file__).with_name("together.py")
    command = [*LAUNCH, str(script), str(root), str(root / "jobs.json")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return root


def groups_agree(one, other, widths):
    """The share of groups of four that keep the same positions; `widths` are the layers' inputs."""
    same = total = 0
    for key, meta in one.items():
        if key.endswith(".weight_meta"):
            width = widths[key.removesuffix(".weight_meta")]
            kept = [unpack_mask(bits, width).unflatten(1, (-1, 4)) for bits in (meta, other[key])]
            agree = (kept[0] == kept[1]).all(-1)
            same, total = same + int(agree.sum()), total + agree.numel()
    return same / total


def farthest(one, other):
    """The largest difference of a tensor of floats of `one` to that of the other, over its norm."""
    floating = {key: value for key, value in one.items() if value.is_floating_point()}
    return max(float((value - other[key]).norm() / value.norm()) for key, value in floating.items())


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def sums_of_two(monkeypatch):
    """Has one process add up the statistics in the order that two do: its windows' first half, and its second.

    ADMM changes masks step by step. Where two choices are within rounding, another order of sums gives another mask,
    and the layers behind see other inputs; so here the order is the same.
    """
    add, over_all = GramAccumulator.add, GramAccumulator.over_all

    def add_apart(self, inputs, others=None):
        parts, pairs = (inputs,), (others,)
        if inputs.dim() == 3:  # not an expert's tokens
            parts, pairs = inputs.chunk(2), (None, None) if others is None else others.chunk(2)
            vars(self).setdefault("apart", GramAccumulator(inputs.shape[-1], inputs.device))
        for statistics, mine, theirs in zip((self, vars(self).get("apart")), parts, pairs, strict=False):
            add(statistics, mine, theirs)

    def over_both(self, ranks, paired=False):
        apart = vars(self).pop("apart", None)
        if apart is not None:
            self.gram.add_(apart.gram)
            self.tokens += apart.tokens
            if self.cross is not None:
                self.cross += apart.cross
        return over_all(self, ranks, paired)

    monkeypatch.setattr(GramAccumulator, "add", add_apart)
    monkeypatch.setattr(GramAccumulator, "over_all", over_both)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name.removesuffix("-2") for name in jobs() if name.endswith("-2")])
def test_two_processes_give_what_one_gives(kind, together, sums_of_two):
    job = jobs()[f"{kind}-2"]
    config = EGGSConfig("2:4", calibration=str(together / "text.txt"), **job["config"])
    prune_checkpoint(together / job["model"], together / f"{kind}-1", config, progress=False)
    one, two = tensors(together / f"{kind}-1"), tensors(together / f"{kind}-2")
    assert one.keys() == two.keys()
    report = json.loads((together / f"{kind}-1" / "report.json").read_text())
    widths = {layer["name"]: layer["in_features"] for layer in report["layers"]}
    # Where a gradient is no more than rounding, the first steps of Adam are as long as elsewhere. The first block is
    # tuned alike but for that; behind it inputs differ by as little, which now and then decides between two masks of
    # ADMM. Tuned by the gradients of one process alone, both come out several times as far apart.
    tuned = bool(report["tuning"])
    assert groups_agree(one, two, widths) > (0.98 if tuned else 0.999)
    of_first = {key: value for key, value in one.items() if ".layers.0." in key}
    assert groups_agree(of_first, two, widths) > 0.999
    assert not tuned or farthest(of_first, two) < 1e-3
    assert inspect_checkpoint(together / f"{kind}-2").ok
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(together / f"{kind}-{count}")(tiny.make_windows()).logits
            for count in (1, 2)
        ]
    difference = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert difference < 1e-2
    first, second = (json.loads((together / f"{kind}-{n}" / "report.json").read_text()) for n in (1, 2))
    assert second["measurements"]["processes"] == 2
    assert first["calibration"] == second["calibration"]
    assert [layer["name"] for layer in first["layers"]] == [layer["name"] for layer in second["layers"]]
    tokens = [[layer["tokens"] for layer in report["layers"]] for report in (first, second)]
    assert sum(tokens[0]) == sum(tokens[1])
    for before, after in zip(first["layers"], second["layers"], strict=True):
        assert after["relative_error"] == pytest.approx(before["relative_error"], rel=0.05, abs=1e-4)
    for before, after in zip(first["tuning"], second["tuning"], strict=True):
        assert after["error_after"] == pytest.approx(before["error_after"], rel=0.05)


@pytest.mark.slow
def test_bad_input_ends_all_processes_alike(together):
    for name, error in {
        "uneven": "ConfigError: num_samples=15 cannot be shared out evenly over 2 processes",
        "missing": "ConfigError: targets: the pattern 'nothing' matches no linear layer",
        "again": "OutputError",
        "short": f"CalibrationError: calibration='{together / 'short.txt'}' has ",
        "other": "ConfigError: calibration is not the same in process 1 as in process 0",
        "broken": "NumericalError: no solution",
    }.items():
        for rank in (0, 1):
            assert (together / f"{name}-{rank}.txt").read_text().startswith(error)
        assert not (together / name / "config.json").exists()


@pytest.mark.slow
def test_a_damping_that_one_process_raises_is_raised_by_all(together):
    first, *others = json.loads((together / "raised" / "report.json").read_text())["layers"]
    assert first["damping"] == pytest.approx(0.1)
    assert all(layer["damping"] is None for layer in others)
    assert inspect_checkpoint(together / "raised").ok


def test_windows_are_shared_out_batch_by_batch():
    windows = torch.arange(8).view(4, 2)
    parts = [Ranks(rank, 2).share(windows) for rank in (0, 1)]
    assert [part[:, 0].tolist() for part in parts] == [[0, 2], [4, 6]]
    assert torch.equal(Ranks().share(windows), windows)
    with pytest.raises(ConfigError, match=r"batch_size=3 cannot be shared out evenly over 2 processes"):
        Ranks(0, 2).check(10, 3)
    Ranks(0, 2).check(3, 2, generated_samples=5)
    with pytest.raises(ConfigError, match=r"num_samples \+ generated_samples=7 cannot be shared out evenly over 2"):
        Ranks(0, 2).check(4, 2, generated_samples=3)


def test_work_is_shared_out_evenly():
    costs = {str(i): cost for i, cost in enumerate([9, 1, 5, 5, 3, 7, 2, 8])}
    owners = Ranks(0, 3).deal(costs)
    loads = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= max(costs.values()) // 3
    assert sorted(name for rank in range(3) for name in Ranks(rank, 3).mine(costs)) == sorted(costs)


def test_only_safetensors_files_are_pruned_by_several(monkeypatch, capsys, text_file, tmp_path):
    monkeypatch.setattr("optimum_eggs.ranks.join_ranks", lambda cpu: Ranks(0, 2))
    assert main(["prune", str(tmp_path), str(tmp_path / "out"), "--calibration", str(text_file)]) == 2
    assert "is not in safetensors files, which alone 2 processes can prune together" in capsys.readouterr().err


def test_several_processes_work_on_the_device_that_is_named(monkeypatch, capsys, text_file, tmp_path):
    def device(name):  # as where there is a GPU
        return torch.device("cuda" if name == "auto" else name)

    monkeypatch.setattr("optimum_eggs.devices.choose_device", device)
    asked = []
    monkeypatch.setattr("optimum_eggs.ranks.join_ranks", lambda cpu: asked.append(cpu) or Ranks(0, 2))
    for flags in ([], ["--device", "cpu"]):
        assert main(["prune", str(tmp_path), str(tmp_path / "out"), "--calibration", str(text_file), *flags]) == 2
    assert asked == [False, True]


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    """A model of ten blocks."""
    folder = tmp_path_factory.mktemp("deep")
    kind, config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 10
    torch.manual_seed(0)
    kind._from_config(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    (folder / "text.txt").write_text(tiny.make_text(4000))
    return folder


def command(folder, output):
    sizes = ["--num-samples", "16", "--seq-len", "32", "--set", "band=8", "--batch-size", "4", "--preset", "best"]
    sizes += ["--block-tuning", "4"]
    given = [str(folder / "llama"), str(output), "--calibration", str(folder / "text.txt"), *sizes]
    return [*LAUNCH, "-m", "optimum_eggs", "prune", *given]


def wait_for_a_block(work, running=None):
    deadline = time.monotonic() + 200
    while not list(work.glob("*/journal.json")):
        assert running is None or running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_and_the_next_goes_on(victim, deep, tmp_path):
    whole, output = deep / "whole", tmp_path / "out"
    if not whole.exists():
        subprocess.run(command(deep, whole), env=ENVIRONMENT, capture_output=True, check=True, timeout=300)
    running = subprocess.Popen(command(deep, output), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_a_block(tmp_path / ".out.unfinished", running)
    workers = {int(child.environ()["RANK"]): child for child in psutil.Process(running.pid).children()}
    os.kill(workers[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = running.communicate(timeout=100)
    assert time.monotonic() - killed < 60
    assert running.returncode != 0
    assert "Signal 9 (SIGKILL)" in stderr or "one of them may be gone" in stderr
    assert not output.exists()

    done = subprocess.run(command(deep, output), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = tensors(whole), tensors(output)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    report = json.loads((output / "report.json").read_text())
    assert report["measurements"]["blocks_of_earlier_runs"] >= 1
    assert len(report["layers"]) == 70


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_left_alone_says_so(victim, deep, forks, tmp_path):
    """Without `torchrun`, which ends all others when one is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = command(deep, tmp_path / "out")
    alone = arguments[arguments.index("optimum_eggs") - 1 :]
    shared = forks.environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    workers = [forks.start(*alone, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    wait_for_a_block(tmp_path / ".out.unfinished")
    workers[victim].kill()
    workers[victim].wait()
    left = workers[1 - victim].wait(60)
    assert left.returncode == 2
    assert "error: the exchange with the other processes failed" in left.stderr
    assert "one of them may be gone" in left.stderr


@pytest.mark.slow
def test_accelerate_starts_the_same_processes(together, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    sizes = [part for key, value in SIZE.items() for part in ("--set", f"{key}={value}")]
    given = [str(together / "llama"), str(tmp_path / "out"), "--calibration", str(together / "text.txt"), *sizes]
    run = [*launcher, "-m", "optimum_eggs", "prune", *given]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["measurements"]["processes"] == 2
    one, other = tensors(together / "fast-2"), tensors(tmp_path / "out")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
def test_a_run_of_two_processes_is_not_continued_by_one(deep, tmp_path, caplog):
    running = subprocess.Popen(command(deep, tmp_path / "out"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for_a_block(tmp_path / ".out.unfinished", running)
    workers = psutil.Process(running.pid).children()
    running.kill()
    for worker in workers:
        worker.kill()
    psutil.wait_procs([running, *workers], timeout=30)
    arguments = command(deep, tmp_path / "out")
    assert main(arguments[arguments.index("prune") :]) == 0
    assert "processes was 2 and is now 1); this one starts from the beginning" in caplog.text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["measurements"]["blocks_of_earlier_runs"] == 0
