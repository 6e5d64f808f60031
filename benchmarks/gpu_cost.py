"""What pruning on one GPU should take: what is done, counted, over what a card does in a second. Runs anywhere.

    python benchmarks/gpu_cost.py
    python benchmarks/gpu_cost.py --card gpu.json

Operations are counted from the shapes, as cost_model.py does. Launches, waits of the host and bytes of what is not a
product are counted by running the functions themselves, on small matrices: they follow the code. All of it is added up,
also what a GPU does while the host goes on. The rates are shares of what the makers state, or, with `--card`, those
that gpu.py has measured. Reading and writing files is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cost_model import SHAPES, Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_eggs.calibration.batches import short_batch, short_count
from optimum_eggs.config import EGGSConfig
from optimum_eggs.engine.rotation import STEPS
from optimum_eggs.engine.tune import judged_batches
from optimum_eggs.masks import channel_order, expander_mask
from optimum_eggs.masks.expander import _CHUNK_ELSEWHERE
from optimum_eggs.pattern import NMPattern
from optimum_eggs.presets import PRESETS
from optimum_eggs.update import Problem, admm, masked_refit, sparsegpt
from optimum_eggs.update.admm import _EVERY, _FIRST_PENALTY

PATTERN, BAND = NMPattern(2, 4), 16
ADMM_STEPS = 33  # of all layers looked at, in a block of SmolLM2-135M and one of Qwen2.5-0.5B
_GROWTH = 1.3  # of its penalty at every third step, as at first, while more than 10 % of a mask changes
SHORT = 0.005  # share of tiles that the largest scores leave short, from 0.0003 to 0.018 in these
AFTER_LAYER = 4 + 8 + 11 + 3  # waits: are weights finite, error, bits; what scores alone lack; certificate; packing
_TILES = _CHUNK_ELSEWHERE // (BAND * PATTERN.m**2)  # that `expander_mask` solves at a time
_ADAM = 60  # bytes moved for a parameter in a step: the optimizer's, the mask on the gradient, casts to and fro

_TURNED = 100  # bytes moved for a weight in a step of choosing a rotation: its importance, the mask, two gradients


@dataclass(frozen=True)
class Card:
    """What a GPU and its host do: operations and bytes a second; seconds of a launch, a wait and an assignment.

    `factor32` and `factor` are Cholesky in float32 and float64; `assignment` is scipy's, of 512 groups, on the host.
    """

    float32: float
    tf32: float
    half: float
    float64: float
    factor32: float
    factor: float
    bandwidth: float
    launch: float
    wait: float
    assignment: float


def stated(float32: float, tf32: float, half: float, float64: float, bandwidth: float) -> Card:
    """From what the maker states, dense: 0.6 of it for products, 0.3 for factorisations, 0.75 for memory."""
    return Card(
        float32=0.6e12 * float32,
        tf32=0.6e12 * tf32,
        half=0.6e12 * half,
        float64=0.6e12 * float64,
        factor32=0.3e12 * float32,
        factor=0.3e12 * float64,
        bandwidth=0.75e12 * bandwidth,
        launch=6e-6,
        wait=15e-6,
        assignment=0.015,
    )


CARDS = {
    "H100 SXM": stated(66.9, 494.7, 989.4, 66.9, 3.35),
    "RTX 4090": stated(82.6, 82.6, 165.2, 1.29, 1.008),
}


@dataclass(frozen=True)
class Work:
    """What is to be done, in the units of [`Card`]."""

    float32: float = 0
    tf32: float = 0
    half: float = 0
    float64: float = 0
    factor32: float = 0
    factor: float = 0
    bandwidth: float = 0
    launch: float = 0
    wait: float = 0
    assignment: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __sub__(self, other: Work) -> Work:
        return self + -1 * other

    def __rmul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, each.name) for each in fields(self)))

    def seconds(self, card: Card) -> float:
        """On a card."""
        rates = ("float32", "tf32", "half", "float64", "factor32", "factor", "bandwidth")
        rated = sum(getattr(self, name) / getattr(card, name) for name in rates)
        return rated + sum(getattr(self, name) * getattr(card, name) for name in ("launch", "wait", "assignment"))


class _Counter(TorchDispatchMode):
    """Counts what a GPU would be given to do, while the CPU does it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.waits, self.bytes = 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index.dtype is torch.bool for index in args[1] if index is not None
        )
        waits = by_mask or name in ("_local_scalar_dense", "equal", "nonzero", "masked_select")
        self.waits += waits
        if not (function.is_view or name.startswith("empty")):
            self.launches += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * min(4, tensor.element_size()) for tensor in tensors)
        return result


def counted(work: Callable[[], object]) -> Work:
    """Launches, waits and bytes of some work on the CPU, products included.

    Under the dispatcher nothing goes to kernels of the processor, which a GPU does not have. float64 counts as float32.
    """
    with torch.no_grad(), _Counter() as counter:
        work()
    return Work(bandwidth=counter.bytes, launch=counter.launches, wait=counter.waits)


def even(rows: int, columns: int) -> Tensor:
    """A score (rows, columns) whose largest keep as many of every column."""
    noise = torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 1 + noise / 9 + (torch.arange(rows)[:, None] + torch.arange(columns)) % 2


@dataclass(frozen=True)
class Counts:
    """What the functions do besides products: for each number of (out, in) the bytes, for each call the rest."""

    project: Work
    chunk: Work
    step: Work
    refit: Work
    column: Work
    regrouped: Work


@cache
def counts() -> Counts:
    """Of this version of the code."""
    rows, columns = 512, 32
    score, gram = even(rows, columns), torch.eye(columns, dtype=torch.float64)
    mask = expander_mask(score, PATTERN, 1, BAND)
    short = score.clone()
    short[:BAND, 0] = 0
    problem = Problem(gram)

    def each(work: Work) -> Work:
        return Work(work.float32, bandwidth=work.bandwidth / score.numel(), launch=work.launch, wait=work.wait)

    def project(score: Tensor) -> Tensor:
        return expander_mask(score, PATTERN, 1, BAND)

    plain = counted(lambda: project(score))
    steps = [counted(partial(admm, score, problem, project, n)) for n in (1, 2)]
    refits = [counted(partial(masked_refit, score, mask, problem, n)) for n in (1, 2)]
    chosen = mask[:, :4]
    columnwise = [
        counted(partial(sparsegpt, score[:, :n], Problem(gram[:n, :n]), PATTERN, choose=lambda _: chosen))
        for n in (16, 32)
    ]
    orders = [counted(partial(channel_order, score[:, :n], PATTERN, 1)) for n in (16, 32)]
    return Counts(
        each(plain),
        counted(lambda: project(short)) - plain,
        each(steps[1] - steps[0]),
        each(refits[1] - refits[0]),
        1 / 16 * (columnwise[1] - columnwise[0]),
        1 / 16 * (orders[1] - orders[0]),  # four groups more, each once for each of its four places
    )


def projection(found: Counts, rows: int, columns: int) -> Work:
    """The mask under a floor."""
    chunks = -(-SHORT * rows * columns // (BAND * PATTERN.m) // _TILES)
    return _sized(found.project, rows * columns) + chunks * found.chunk


def _sized(work: Work, numbers: int) -> Work:
    return Work(bandwidth=work.bandwidth * numbers, launch=work.launch, wait=work.wait)


def factor_work(columns: int) -> Work:
    """SparseGPT's factor: Cholesky, and the inverse of the triangle by triangular systems."""
    return Work(factor=columns**3 / 3, float64=columns**3 / 3)


def refit_work(found: Counts, rows: int, columns: int, steps: int) -> Work:
    """Of one layer; its start costs as much as a step."""
    return (steps + 1) * (Work(float32=2 * rows * columns**2) + _sized(found.refit, rows * columns))


@cache
def factor_dtype(columns: int, penalty: float) -> torch.dtype:
    """That ADMM factorises in: asked of the code, with a Gram matrix that has a shape alone."""
    return Problem(torch.empty(columns, columns, device="meta")).penalised(penalty).dtype


def factorisation(columns: int, dtype: torch.dtype, inverted: bool) -> Work:
    """One of ADMM's: Cholesky, an inverse if asked for, and two waits: what has changed before it, and its check."""
    moved = Work(bandwidth=10 * dtype.itemsize * columns**2, wait=2)
    cholesky, inverse = columns**3 / 3, 2 * columns**3 * inverted
    if dtype is torch.float64:
        return Work(factor=cholesky, float64=inverse) + moved
    return Work(factor32=cholesky, float32=inverse) + moved


def admm_work(found: Counts, rows: int, columns: int, steps: int | None = None) -> dict[str, Work]:
    """Products, factorisations and the rest of one layer; its rows decide whether a factor is inverted."""
    steps = steps or ADMM_STEPS
    inverted = 2 * rows >= columns
    factorised = {torch.float32: Work(), torch.float64: Work()}
    for number in range(1 + (steps - 1) // _EVERY):  # the last step ends it, and needs none
        dtype = factor_dtype(columns, _FIRST_PENALTY * _GROWTH**number)
        factorised[dtype] += factorisation(columns, dtype, inverted)
    # two triangular systems count twice: they reach half the rate of a product
    product = Work(float32=(2 if inverted else 4) * rows * columns**2)
    other = _sized(found.step, rows * columns)
    masks = projection(found, rows, columns)
    return {
        "ADMM: products": steps * product,
        "ADMM: factorisations in float32": factorised[torch.float32],
        "ADMM: factorisations in float64": factorised[torch.float64],
        "ADMM: elementwise": steps * (other - _sized(found.project, rows * columns)),
        "masks under a floor": (steps + 2) * masks,
    }


def sparsegpt_work(found: Counts, rows: int, columns: int) -> dict[str, Work]:
    """Of one layer, without the factor."""
    groups, tiles = columns // PATTERN.m, rows / BAND
    masks = _sized(found.project, rows * PATTERN.m) + min(1, SHORT * tiles) * found.chunk
    rewritten = Work(bandwidth=rows * columns * (128 + columns / 32))
    launched = Work(launch=found.column.launch * columns, wait=found.column.wait * columns)
    return {
        "SparseGPT: columns": Work(float32=rows * columns**2) + rewritten + launched,
        "masks under a floor": groups * masks,
    }


def order_work(found: Counts, rows: int, columns: int, rounds: int) -> Work:
    """An order of inputs: groups of one assignment are at most 512."""
    groups = columns // PATTERN.m
    parts = -(-groups // 512)
    size, times = groups / parts, rounds * PATTERN.m * parts
    gains = Work(float32=16 * size**2 * rows, bandwidth=256 * size * rows, assignment=(size / 512) ** 3, wait=4)
    launched = Work(launch=found.regrouped.launch, wait=found.regrouped.wait)
    return times * (size * launched + gains)


def block_work(shape: Shape, windows: int, seq_len: int, preset: str, **otherwise: bool) -> dict[str, Work]:
    """One block, stage by stage.

    Statistics and the linear layers in a step of tuning multiply in half precision, unless all is to be in `float32`.
    `otherwise` are values of the method, and `float32`.
    """
    float32 = otherwise.pop("float32", False)
    found, values = counts(), PRESETS[preset] | otherwise
    share = EGGSConfig(PATTERN, preset=preset, block_tuning=values["block_tuning"]).short_share
    short, (together, length) = short_count(windows, seq_len, 1, share), short_batch(1, seq_len)
    tokens = windows * seq_len + short * length
    attention = 4 * seq_len * shape.hidden
    made: dict[str, Work] = {"forward": Work(), "statistics": Work()}

    def add(name: str, work: Work) -> None:
        made[name] = made.get(name, Work()) + work

    def product(operations: float) -> Work:
        return Work(**{"float32" if float32 else "half": operations})

    for inputs, outputs in shape.stages:
        products = 2 if values["error_correction"] else 1
        add("statistics", product(products * 2 * inputs**2 * tokens))
        if values["solver"] == "sparsegpt":
            add("SparseGPT: factor in float64", factor_work(inputs))
        for rows in outputs:
            solver = admm_work if values["solver"] == "admm" else sparsegpt_work
            for name, work in solver(found, rows, inputs).items():
                add(name, work)
            if values["error_correction"]:
                add("corrected target", Work(float32=6 * rows * inputs**2, bandwidth=20 * rows * inputs))
            add("refit", refit_work(found, rows, inputs, values["refit_steps"]))
            # two products for the error; the score and its mask, certificate and packing once over
            after = Work(float32=4 * rows * inputs**2, bandwidth=200 * rows * inputs, wait=AFTER_LAYER)
            add("report and packing", after)
    whole = 2 * shape.weights + attention
    if values["rotation"]:
        for name, work in rotation_work(shape).items():
            add(name, work)
        add("statistics", product(sum(2 * inputs**2 for inputs, _ in shape.stages) * tokens))
    # the dense block is passed as often to correct errors, and once to be tuned to; what is tuned is passed as a whole
    dense, tuned = bool(values["error_correction"]), bool(values["block_tuning"])
    passes = (1 + dense) * shape.before_statistics(seq_len) + (dense + (not tuned)) * shape.behind_attention
    # through the dense model for a rotation: for the statistics, and to leave the block
    extra = bool(values["permutation"]) + tuned + (tuned and not dense) + 2 * bool(values["rotation"])
    add("forward", Work(half=tokens * (passes + whole * extra)))
    if values["permutation"]:
        head = head_size(shape)
        heads, queries = shape.keys // head, shape.hidden // shape.keys
        add("permutation", order_work(found, shape.hidden, shape.intermediate, 3))
        add("permutation", heads * order_work(found, shape.hidden * queries, head, 10))
    if values["block_tuning"]:
        # a step costs three passes of a window; what judges is in float32, as is attention
        steps, judged = 3 * values["block_tuning"], 2 * len(judged_batches(windows + -(-short // together)))
        add("tuning", product(2 * shape.weights * seq_len * steps))
        add("tuning", Work(float32=seq_len * (whole * judged + attention * steps)))
        add("tuning", Work(bandwidth=_ADAM * shape.weights * values["block_tuning"]))
    return made


def rotation_work(shape: Shape) -> dict[str, Work]:
    """What choosing a rotation takes for a block, without the statistics."""
    width = shape.hidden
    # of each layer, no more rows or columns than the stream is wide
    weights = width * sum(min(rows, width) for inputs, outputs in shape.stages for rows in outputs if inputs == width)
    weights += width**2 * sum(inputs != width for inputs, _ in shape.stages)
    layers = sum(len(outputs) for _, outputs in shape.stages)
    step = Work(float32=4 * weights * width, bandwidth=_TURNED * weights, launch=60 * layers, wait=2 * layers)
    factors = sum((factor_work(inputs) for inputs, _ in shape.stages), Work())
    return {"rotation": STEPS * step + Work(float32=4 * width**3), "rotation: factors in float64": factors}


def head_size(shape: Shape) -> int:
    """Of a Llama of that shape; a small one has two key heads."""
    return min(128, shape.keys // 2)


def measured(path: Path) -> Mapping[str, Card]:
    """The rates in a result of gpu.py."""
    found = json.loads(path.read_text())
    rates = next(row for row in found["rows"] if row["part"] == "rates")
    return {found["machine"]["device"]: Card(**{each.name: rates[each.name] for each in fields(Card)})}


def what_if(shape: Shape, windows: int, seq_len: int, cards: Mapping[str, Card]) -> str:
    """A table of minutes that `best` takes, as counted and if something were otherwise."""

    def scaled(factor: float, *names: str) -> list[Card]:
        return [replace(card, **{name: factor * getattr(card, name) for name in names}) for card in cards.values()]

    def row(label: str, cards: Iterable[Card], length: int = seq_len, **otherwise: Any) -> str:
        constants = {key: otherwise.pop(key) for key in list(otherwise) if key in globals()}
        with patch.dict(globals(), constants):
            work = sum(block_work(shape, windows, length, "best", **otherwise).values(), Work())
        return " | ".join([f"| {label}", *(f"{shape.blocks * work.seconds(card) / 60:.0f}" for card in cards)]) + " |"

    plain, slow = list(cards.values()), scaled(1 / 3, "factor32", "factor", "float64")
    rows = [
        row("as above", plain),
        row("ADMM does 90 steps a layer in place of 33", plain, ADMM_STEPS=90),
        row("ADMM never settles, and does 300", plain, ADMM_STEPS=300),
        row("ρ grows by 1.1", plain, _GROWTH=1.1),
        row("ρ begins to grow from 0.02", plain, _FIRST_PENALTY=0.02),
        row("every launch and every wait takes twice as long", scaled(2, "launch", "wait")),
        row("Cholesky, and float64 altogether, take three times as long", slow),
        row("tuning and statistics multiply in float32", plain, float32=True),
        row("windows of 512 tokens", plain, 512),
        row("with rotation=True", plain, rotation=True),
    ]
    return "\n".join([f"| if | {', minutes | '.join(cards)}, minutes |", f"|---|{'---:|' * len(cards)}", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B", choices=list(SHAPES))
    parser.add_argument("--presets", nargs="+", default=["fast", "best"], choices=["fast", "best"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--float32", action="store_true", help="statistics and tuning in float32 too")
    parser.add_argument("--what-if", action="store_true", help="minutes of `best`, were something otherwise")
    parser.add_argument("--card", type=Path, help="a result of gpu.py, for its rates")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    cards = measured(args.card) if args.card else CARDS
    if args.what_if:
        print(what_if(shape, args.num_samples, args.seq_len, cards))
        return
    for preset in args.presets:
        block = block_work(shape, args.num_samples, args.seq_len, preset, float32=args.float32)
        stages = {name: shape.blocks * work for name, work in block.items()}
        stages["all"] = sum(stages.values(), Work())
        print(f"\n{args.shape}, {preset}, {args.num_samples} x {args.seq_len} tokens: operations, bytes and seconds\n")
        columns = ["half, 10¹⁵", "float32, 10¹⁵", "float64, 10¹⁵", "moved, TB", "launches, 10³", "waits, 10³"]
        columns += [f"{card}, s" for card in cards]
        print(f"| stage | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
        for name, work in stages.items():
            products = [work.half, work.float32 + work.factor32, work.float64 + work.factor]
            others = [work.bandwidth / 1e12, work.launch / 1e3, work.wait / 1e3]
            values = [*(product / 1e15 for product in products), *others]
            cells = [f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in values]
            seconds = [f"{work.seconds(card):.0f}" for card in cards.values()]
            print(f"| {name} | {' | '.join(['' if cell == '0' else cell for cell in cells] + seconds)} |")


if __name__ == "__main__":
    main()
