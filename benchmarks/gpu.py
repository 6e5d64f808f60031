"""What is there for GPUs, tested and timed in one go of about 8 minutes: the first thing to run where there is a GPU.

    python benchmarks/gpu.py --json gpu.json

In this order: what the card does in a second; the tests of tests/cuda; one random block of the shape of LLaMA-3-8B,
pruned by the presets `fast` and `best`, and what the whole model would take by that; every solver at the shapes of that
block; packed layers by every backend, Triton's last, since a kernel that goes wrong can take the process with it.
A result is checked before its time is told. Rows are in the file as they come, also those that failed or were left out,
with the reason: what would not fit into `--budget` is left out, and what has begun is finished. `docs/gpu.md` says what
was predicted, and `python benchmarks/gpu_cost.py --card gpu.json` what follows from the rates found here.

Where there is no GPU, or with `--tiny`, the same runs on small shapes: worth nothing but to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cost_model import SHAPES, Shape
from gpu_cost import (
    ADMM_STEPS,
    BAND,
    PATTERN,
    Card,
    Work,
    admm_work,
    block_work,
    counts,
    factor_work,
    head_size,
    order_work,
    projection,
    refit_work,
    sparsegpt_work,
)
from torch import Tensor

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import GramAccumulator
from optimum_eggs.devices import choose_device, described
from optimum_eggs.engine import prune_model
from optimum_eggs.engine.report import library_versions
from optimum_eggs.errors import EGGSError, NumericalError
from optimum_eggs.importance import IMPORTANCE, importance_score
from optimum_eggs.masks import channel_order, expander_mask, topn_mask
from optimum_eggs.masks.checks import check_mask
from optimum_eggs.masks.permutation import kept_score
from optimum_eggs.measure import processor
from optimum_eggs.ops import BACKENDS, choose, force
from optimum_eggs.presets import PRESETS
from optimum_eggs.speed import time_layer
from optimum_eggs.speed.timing import alternate
from optimum_eggs.update import Problem, admm, masked_refit, relative_error, sparsegpt

TINY = Shape(blocks=2, hidden=64, intermediate=192, keys=32)
_TEST = re.compile(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)", re.MULTILINE)


class Record:
    """The rows of a run, in a file as they come; and the time that is left."""

    def __init__(self, path: Path | None, machine: Mapping[str, Any], budget: float) -> None:
        self.path, self.machine, self.budget = path, machine, budget
        self.rows: list[dict[str, Any]] = []
        self.begun = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.monotonic() - self.begun)

    def add(self, part: str, name: str, **values: Any) -> None:
        """One row more, written at once."""
        self.rows.append({"part": part, "name": name, **values, "at": round(time.monotonic() - self.begun, 1)})
        told = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
        print(f"{part}: {name}: {', '.join(f'{key} {_short(value)}' for key, value in told.items())}", flush=True)
        if self.path:
            beside = self.path.with_name(f"{self.path.name}.partial")
            text = {"machine": self.machine, "budget": self.budget, "rows": self.rows}
            beside.write_text(json.dumps(text, indent=1) + "\n")
            beside.replace(self.path)

    def attempt(self, part: str, name: str, needs: float, work: Callable[[], dict[str, Any]], **known: Any) -> None:
        """Add what is `known` and what `work` gives, or why it gives nothing: too little time is left, or it failed."""
        if needs > self.left:
            self.add(part, name, left_out=f"takes about {needs:.0f} s, and {max(0, self.left):.0f} s are left")
            return
        try:
            found = work()
        except Exception as error:  # whatever a card or its driver raises: the rest is still worth knowing
            found = {"failed": f"{type(error).__name__}: {error}"}
        self.add(part, name, **known, **found)


def _short(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def require(holds: bool | Tensor, what: str) -> None:
    """Raise unless a result is what it should be."""
    if not bool(holds):
        raise NumericalError(f"{what} does not hold")


def machine(device: torch.device) -> dict[str, Any]:
    """What the rows were measured on, and with."""
    here = Path(__file__).parent
    asked = {
        "commit": ["git", "-C", str(here), "describe", "--always", "--dirty"],
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    }
    found: dict[str, Any] = {"device": described(device), "processor": processor()}
    for name, command in asked.items() if device.type == "cuda" else list(asked.items())[:1]:
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found[name] = f"unknown ({error})"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
    triton = version("triton") if find_spec("triton") else None
    return found | {"versions": library_versions() | {"cuda": torch.version.cuda, "triton": triton}}


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median of some runs after one to warm up."""
    return alternate([work], repeats, devices=[device])[0].median


def rates(device: torch.device, tiny: bool) -> Card:
    """What the card and its host do."""
    size, order, numbers = (128, 128, 1 << 16) if tiny else (8192, 8192, 1 << 28)

    def product(dtype: torch.dtype, precision: str = "highest") -> float:
        x = torch.randn(size, size, device=device, dtype=dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return 2 * size**3 / seconds(lambda: x @ x, device)
        finally:
            torch.set_float32_matmul_precision(before)

    def cholesky(dtype: torch.dtype) -> float:
        definite = torch.eye(order, device=device, dtype=dtype).mul_(order).add_(1)
        return order**3 / 3 / seconds(lambda: torch.linalg.cholesky(definite), device, 3)

    source = torch.zeros(numbers, device=device)
    target, little = torch.empty_like(source), torch.zeros(1, device=device)
    gains = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)).double().numpy()

    def assign() -> None:
        from scipy.optimize import linear_sum_assignment

        linear_sum_assignment(gains, maximize=True)

    return Card(
        float32=product(torch.float32),
        tf32=product(torch.float32, "high"),
        half=product(torch.bfloat16),
        float64=product(torch.float64),
        factor32=cholesky(torch.float32),
        factor=cholesky(torch.float64),
        bandwidth=8 * numbers / seconds(lambda: target.copy_(source), device),
        launch=seconds(lambda: [little.add_(1) for _ in range(1000)], device) / 1000,
        wait=seconds(lambda: [float(little) for _ in range(100)], device) / 100,
        assignment=seconds(assign, device, 3),
    )


def tests(device: torch.device, selection: list[str], limit: float) -> dict[str, Any]:
    """Counts of the outcomes of tests/cuda, as far as the time goes, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *selection]
    environment = os.environ | {"OPTIMUM_EGGS_TEST_DEVICE": device.type, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as output:
        try:
            root = Path(__file__).parents[1]
            subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=output, timeout=limit)
            cut = False
        except subprocess.TimeoutExpired:
            cut = True
        output.seek(0)
        printed = output.read()
    found = outcomes(printed)
    if not (cut or any(found[key] for key in ("passed", "failed", "skipped", "errors"))):
        raise RuntimeError(f"no test ran: {printed.strip()[-400:]}")
    return found | {"cut": cut}


def outcomes(printed: str) -> dict[str, Any]:
    """What `pytest -v` has printed, counted, also where it was cut."""
    found = _TEST.findall(printed)
    count = Counter(outcome for _, outcome in found)
    return {
        "passed": count["PASSED"],
        "failed": count["FAILED"],
        "skipped": count["SKIPPED"],
        "errors": count["ERROR"],
        "failures": [name for name, outcome in found if outcome in ("FAILED", "ERROR")],
    }


@contextmanager
def factorisations() -> Iterator[Counter[torch.dtype]]:
    """Counts those of ADMM within, by their dtype."""
    original, found = Problem.penalised, Counter[torch.dtype]()

    def penalised(problem: Problem, penalty: float) -> Tensor:
        lower = original(problem, penalty)
        found[lower.dtype] += 1
        return lower

    with patch.object(Problem, "penalised", penalised):
        yield found


def pruned(shape: Shape, preset: str, windows: int, seq_len: int, steps: int, device: torch.device) -> dict[str, Any]:
    """One random block of a shape pruned, stage by stage, and what a whole model of such blocks would take."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    head = head_size(shape)
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.hidden // head,
        num_key_value_heads=shape.keys // head,
        head_dim=head,
        vocab_size=1024,
        max_position_embeddings=seq_len,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (windows, seq_len), generator=torch.Generator().manual_seed(0))
    values = {"block_tuning": steps} if preset == "best" else {}
    settings = EGGSConfig(PATTERN, preset=preset, num_samples=windows, seq_len=seq_len, **values)  # type: ignore[arg-type]
    batch = ids[: settings.batch_size].to(device)
    with torch.no_grad():
        one_pass = seconds(lambda: model.model(input_ids=batch, use_cache=False), device, 3)
    one_pass *= windows * (1 + settings.short_share) / len(batch)
    with factorisations() as factorised:
        report = prune_model(model, settings, ids, progress=False)
    for layer in report.layers:
        least = layer.certificate.floors[layer.band]
        require(layer.certificate.legal and least >= layer.min_degree > 0, f"the floor of {layer.name}")
        require(layer.relative_error is not None and 0 < layer.relative_error < 0.5, f"a small error of {layer.name}")
    measured = report.measurements
    stages = {name: stage["seconds"] for name, stage in measured["stages"].items()}
    alone = [layer.scores_alone for layer in report.layers if layer.scores_alone]
    found = {
        "windows": windows,
        "seq_len": seq_len,
        "steps": steps,
        "seconds": measured["seconds"],
        "stages": stages,
        "one_pass": one_pass,
        "factorisations": factorised.total(),
        "in_float64": factorised[torch.float64],
        "short": sum(each.short for each in alone) / sum(each.pairs for each in alone),
        "error": report.mean_relative_error,
        "tuning": [asdict(each) for each in report.tuning],
        "peak_cuda": measured.get("peak_cuda"),
    }
    estimate = whole(found, shape.blocks)
    return found | {"whole": estimate, "whole_seconds": estimate["all"]}


def whole(found: Mapping[str, Any], blocks: int) -> dict[str, float]:
    """Seconds by stage of a model of so many blocks, by those of one.

    That one was the last, through which the text does not pass once more at the end; the others' pass is added. Reading
    and writing the model is not in it.
    """
    stages = dict(found["stages"])
    stages["other"] = max(0.0, found["seconds"] - sum(stages.values()))
    stages["forward"] += found["one_pass"]
    return {name: blocks * value for name, value in stages.items()} | {"all": blocks * sum(stages.values())}


def random_statistics(columns: int, tokens: int, device: torch.device) -> tuple[GramAccumulator, dict[str, Any]]:
    """The Gram matrix of random inputs that depend on one another, and how long a batch of `tokens` takes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shared, size = normal(16, columns), normal(columns).mul_(0.5).exp_()
    batches = [
        ((normal(tokens, columns) + normal(tokens, 16) @ shared / 4) * size).bfloat16()
        for _ in range(1 + columns // tokens)
    ]
    found = GramAccumulator(columns, device)
    for batch in batches:
        found.add(batch)
    some = slice(0, min(64, columns))
    exact = sum(batch[:, some].double().t() @ batch.double() for batch in batches)
    off = (found.gram[some].double() - exact).norm() / torch.as_tensor(exact).norm()
    require(off < 1e-4, f"a Gram matrix within 0.0001 (it is off by {float(off):.1e})")
    timing = GramAccumulator(columns, device)
    took = seconds(lambda: timing.add(batches[0]), device)
    return found, {"tokens": tokens, "seconds": took, "tflops": 2 * tokens * columns**2 / took / 1e12}


Solving = tuple[str, Work, int, Callable[[], dict[str, Any]]]
"""Name, what one run is counted to be, about how many there are, and the work."""


def solved(weight: Tensor, problem: Problem, device: torch.device) -> Iterable[Solving]:
    """What is to be timed of a layer (out, in)."""
    (rows, columns), made = weight.shape, counts()
    norm = problem.gram.diagonal().sqrt()
    few = min(4 * BAND, rows)

    def timed(work: Callable[[], object], repeats: int = 3) -> dict[str, Any]:
        return {"seconds": seconds(work, device, repeats)}

    def plain() -> tuple[Tensor, Tensor]:
        score = importance_score("ria", weight, norm)
        return score, topn_mask(score, PATTERN)

    def floored(score: Tensor) -> Tensor:
        return expander_mask(score, PATTERN, 1, BAND)

    def error(values: Tensor) -> float:
        return relative_error(weight, values, problem.gram)

    def importance() -> dict[str, Any]:
        found = {}
        for name in IMPORTANCE:
            own = importance_score(name, weight.cpu(), norm.cpu())
            torch.testing.assert_close(importance_score(name, weight, norm).cpu(), own, rtol=1e-4, atol=0)
            found[name] = seconds(partial(importance_score, name, weight, norm), device)
        return found

    def topn() -> dict[str, Any]:
        score, mask = plain()
        check_mask(mask, PATTERN)
        best = kept_score(score, PATTERN)
        require(abs(float((score * mask).sum(dtype=torch.float64)) - best) < 1e-6 * best, "the largest total score")
        return timed(lambda: topn_mask(score, PATTERN))

    def floor() -> dict[str, Any]:
        score, _ = plain()
        check_mask(mask := floored(score), PATTERN, 1, BAND)
        own, other = score[:few].cpu(), mask[:few].cpu()  # bands do not know of one another
        totals = [float((own * kept).sum(dtype=torch.float64)) for kept in (other, floored(own))]
        require(abs(totals[0] - totals[1]) <= 1e-6 * totals[1], "the total of the CPU")
        return timed(lambda: floored(score))

    def factor() -> dict[str, Any]:
        upper, vector = problem.inverse_factor.double(), torch.ones(columns, device=device, dtype=torch.float64)
        image = problem.gram.double() @ vector + problem.shift.double() * vector
        off = (upper.t() @ (upper @ image) - vector).norm() / vector.norm()
        require(off < 1e-4, f"an inverse (it is off by {float(off):.1e})")
        del upper
        return timed(lambda: Problem(problem.gram, problem.damping).inverse_factor)

    def one_shot() -> dict[str, Any]:
        mask, values = sparsegpt(weight, problem, PATTERN, choose=floored)
        check_mask(mask, PATTERN, 1, BAND)
        found, before = error(values), error(weight * plain()[1])
        require(found < before and not (values * ~mask).any(), f"an error below {before:.4f} (it is {found:.4f})")
        return timed(lambda: sparsegpt(weight, problem, PATTERN, choose=floored), 1) | {"error": found}

    def alternating() -> dict[str, Any]:
        with factorisations() as factorised:
            mask, values = admm(weight, problem, floored, ADMM_STEPS)
        check_mask(mask, PATTERN, 1, BAND)
        found, before = error(masked_refit(weight, mask, problem, 10, values)), error(weight * plain()[1])
        require(found < before, f"an error below {before:.4f} (it is {found:.4f})")
        took = timed(lambda: admm(weight, problem, floored, ADMM_STEPS), 1)
        return took | {"factorisations": factorised.total(), "in_float64": factorised[torch.float64]}

    def refit() -> dict[str, Any]:
        _, mask = plain()
        values = masked_refit(weight, mask, problem, 10)
        found, before = error(values), error(weight * mask)
        require(found < before and not (values * ~mask).any(), f"an error below {before:.4f} (it is {found:.4f})")
        return timed(lambda: masked_refit(weight, mask, problem, 10)) | {"steps": 10, "error": found}

    def order() -> dict[str, Any]:
        score, _ = plain()
        found = channel_order(score, PATTERN)
        require((found.sort().values == torch.arange(columns, device=device)).all(), "an order of all inputs")
        gain = kept_score(score[:, found], PATTERN) / kept_score(score, PATTERN) - 1
        require(gain >= 0, f"a gain (it is {gain:.4f})")
        return timed(lambda: channel_order(score, PATTERN), 1) | {"gain": gain}

    def one(parts: Mapping[str, Work]) -> Work:
        return sum(parts.values(), Work())

    yield "importance", Work(), 1, importance
    yield "topn_mask", Work(), 1, topn
    yield "expander_mask", projection(made, rows, columns), 6, floor
    yield "inverse_factor", factor_work(columns), 5, factor
    yield "sparsegpt", one(sparsegpt_work(made, rows, columns)), 3, one_shot  # the problem keeps its factor
    yield "admm", one(admm_work(made, rows, columns)), 3, alternating
    yield "masked_refit", refit_work(made, rows, columns, 10), 6, refit
    if rows < columns:  # those that a fold reorders
        yield "channel_order", order_work(made, rows, columns, 3), 3, order


def solvers(record: Record, shape: Shape, card: Card, device: torch.device, tiny: bool) -> None:
    """Statistics of every width, and every solver of every shape."""
    heights: dict[int, set[int]] = {}
    for inputs, outputs in shape.stages:
        heights.setdefault(inputs, set()).update(outputs)
    for inputs in sorted(heights):
        made: list[GramAccumulator] = []

        def statistics(inputs: int = inputs, made: list[GramAccumulator] = made) -> dict[str, Any]:
            gram, row = random_statistics(inputs, 96 if tiny else 2048, device)
            made.append(gram)
            return row

        record.attempt("solver", f"GramAccumulator {inputs}", 5, statistics)
        for rows in sorted(heights[inputs]) if made else []:
            weight = torch.randn(rows, inputs, generator=torch.Generator(device).manual_seed(1), device=device)
            problem = Problem(made[0].gram, 0.01)
            for name, one, runs, work in solved(weight, problem, device):
                counted = one.seconds(card)
                record.attempt("solver", f"{name} {rows}x{inputs}", 1 + runs * counted, work, counted=counted)
            del weight, problem


def layer(rows: int, columns: int, tokens: int, device: torch.device, tiny: bool) -> dict[str, Any]:
    """A packed layer against the dense one; more weights are gone through than any cache holds."""
    return asdict(
        time_layer(rows, columns, PATTERN, torch.bfloat16, tokens, 10, 1 << (16 if tiny else 28), device=device)
    )


def layers(record: Record, shape: Shape, tokens: list[int], device: torch.device, tiny: bool) -> None:
    """Packed layers against `F.linear`, by every backend that takes them."""
    shapes = sorted({(out, inputs) for inputs, outputs in shape.stages for out in outputs})
    for backend in ("reference", *(name for name in BACKENDS if name not in ("reference", "triton")), "triton"):
        for rows, columns in shapes:
            for count in tokens:
                name = f"{backend} {rows}x{columns}, {count} tokens"
                try:
                    with force(backend):
                        if choose(torch.bfloat16, device, count).backend == backend:
                            record.attempt("layer", name, 3, partial(layer, rows, columns, count, device, tiny))
                except EGGSError as error:
                    record.add("layer", name, left_out=str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to, as they come")
    parser.add_argument("--budget", type=float, default=460, help="seconds (default: 460)")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="small shapes; of itself on a CPU")
    parser.add_argument("--tests", nargs="*", help="what to give to pytest (default: tests/cuda); nothing for none")
    args = parser.parse_args()
    device = choose_device(args.device)
    tiny = args.tiny or device.type == "cpu"
    shape, tokens, windows, seq_len = (TINY, [1, 8], 4, 32) if tiny else (SHAPES["8B"], [1, 8, 64, 2048], 128, 2048)
    usual = ["tests/cuda/test_solvers.py", "-k", "test_scores"] if tiny else ["tests/cuda"]
    selection = usual if args.tests is None else args.tests
    record = Record(args.json, machine(device), args.budget)

    found: list[Card] = []

    def card() -> dict[str, Any]:
        found.append(rates(device, tiny))
        return asdict(found[0])

    record.attempt("rates", "the card", 10, card)
    limit = 0.35 * record.budget
    if selection:
        work = partial(tests, device, selection, min(limit, record.left))
        record.attempt("tests", "tests/cuda", min(30, limit), work)
    if found:
        for preset in ("fast", "best"):
            needs = 1.5 * sum(block_work(shape, windows, seq_len, preset).values(), Work()).seconds(found[0])
            steps = 6 if tiny else PRESETS["best"]["block_tuning"]
            record.attempt("prune", preset, needs, partial(pruned, shape, preset, windows, seq_len, steps, device))
        with torch.no_grad():
            solvers(record, shape, found[0], device, tiny)
    layers(record, shape, tokens, device, tiny)
    wrong = [row["name"] for row in record.rows if row.get("failed")]
    omitted = sum("left_out" in row for row in record.rows)
    print(f"{len(record.rows)} rows in {record.budget - record.left:.0f} s, {len(wrong)} failed, {omitted} left out")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
