"""Ours beside the published programs of ALPS, SparseGPT, Wanda and RIA, on single layers: masks, errors, steps of ALPS.

Reads what `tests/golden/make_solvers.py` wrote with those programs, `tests/golden/solvers` unless told otherwise, and
prunes the same layers by the presets of the same names. `alps-float64` is the published program with float64 in place
of float32; both are compared with the preset `alps`, which works in float32. The seconds are ours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from optimum_eggs import EGGSConfig
from optimum_eggs.calibration import GramAccumulator
from optimum_eggs.engine.solve import solve_layer
from optimum_eggs.masks import topn_mask
from optimum_eggs.measure import Meter
from optimum_eggs.packing import unpack_mask
from optimum_eggs.pattern import NMPattern
from optimum_eggs.update import Problem, admm

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "solvers"


@dataclass(frozen=True)
class Case:
    """A layer pruned by a published program: weight (out, in), inputs (tokens, in), and what came out."""

    layer: str
    pattern: NMPattern
    program: str
    weight: Tensor
    inputs: Tensor
    mask: Tensor
    error: float
    steps: int | None


@dataclass(frozen=True)
class Comparison:
    """Ours beside theirs: the share of groups with the same mask, relative errors, steps, and our seconds."""

    agreement: float
    error: float
    steps: int | None
    seconds: float


def cases(folder: Path = FOLDER) -> Iterator[Case]:
    """All layers, patterns and programs of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        weight = tensors["weight"].float()
        factor = torch.zeros(weight.shape[1], weight.shape[1])
        lower = torch.tril_indices(*factor.shape)
        factor[lower[0], lower[1]] = tensors["factor"].float()
        for name in sorted(key for key in tensors if key.endswith("/mask")):
            pattern, program, _ = name.split("/")
            steps = tensors.get(f"{pattern}/{program}/steps")
            yield Case(
                file.stem,
                NMPattern.parse(pattern),
                program,
                weight,
                factor.T,
                unpack_mask(tensors[name], weight.shape[1]),
                float(tensors[f"{pattern}/{program}/error"]),
                None if steps is None else int(steps),
            )


def compare(case: Case) -> Comparison:
    """Prune the layer of a case with the preset of its method."""
    statistics = GramAccumulator(case.weight.shape[1], torch.device("cpu"))
    statistics.add(case.inputs)
    config = EGGSConfig(str(case.pattern), preset=case.program.removesuffix("-float64"))
    start = time.perf_counter()
    with Meter() as meter:
        found = solve_layer(case.layer, case.weight, Problem(statistics.gram, config.damping), config, meter)
    seconds = time.perf_counter() - start
    agreement = same_groups(found.mask, case.mask, case.pattern)
    steps = None if case.steps is None else alps(case, statistics.gram)[2]
    return Comparison(agreement, error_of(case, found.weight), steps, seconds)


def same_groups(left: Tensor, right: Tensor, pattern: NMPattern) -> float:
    """The share of groups in which two masks (out, in) are the same."""
    return float((left == right).unflatten(1, (-1, pattern.m)).all(-1).double().mean())


def error_of(case: Case, pruned: Tensor) -> float:
    """‖(W − Z)X‖² / ‖WX‖² in float64, Z (out, in)."""
    weight, inputs = case.weight.double(), case.inputs.double().T
    return float(((weight - pruned) @ inputs).square().sum() / (weight @ inputs).square().sum())


def alps(case: Case, gram: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mask and values of ADMM in the dtype of `gram` (in, in), and its steps: projections but the first and last."""
    projections = 0

    def project(score: Tensor) -> Tensor:
        nonlocal projections
        projections += 1
        return topn_mask(score, case.pattern)

    mask, values = admm(case.weight.to(gram.dtype), Problem(gram), project)
    return mask, values, projections - 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    args = parser.parse_args()
    print("| layer | shape | pattern | program | same groups | error | ours | steps | ours | seconds |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|---:|")
    for case in cases(args.folder):
        ours = compare(case)
        shape = "x".join(map(str, case.weight.shape))
        steps = f"{case.steps} | {ours.steps}" if case.steps is not None else " | "
        print(
            f"| {case.layer} | {shape} | {case.pattern} | {case.program} | {ours.agreement:.3%} | {case.error:.6f} "
            f"| {ours.error:.6f} | {steps} | {ours.seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
