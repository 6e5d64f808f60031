"""How long an order of a layer's inputs takes to find, and what it gains: on random scores, and on a model's layers.

A score is |w| times a norm of the input, as that of Wanda: random weights with input norms that spread as a log-normal
does; or, with `--model`, the weights of all `down_proj` with norms that spread so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from optimum_eggs.hf.loading import load_model
from optimum_eggs.masks import channel_order
from optimum_eggs.masks.permutation import kept_score
from optimum_eggs.pattern import NMPattern


def norms(inputs: int) -> Tensor:
    """Of the inputs, (inputs,)."""
    return torch.randn(inputs, generator=torch.Generator().manual_seed(1)).mul(0.5).exp()


def scores(args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Name and score (out, in) of what is timed."""
    for inputs in args.inputs:
        weight = torch.randn(args.rows, inputs, generator=torch.Generator().manual_seed(0))
        yield f"random {args.rows} x {inputs}", weight.abs() * norms(inputs)
    if args.model:
        for name, module in load_model(args.model, dtype="float32").named_modules():
            if name.endswith("down_proj"):
                weight = module.weight.detach()
                yield name, weight.abs() * norms(weight.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, nargs="*", default=[1536, 4864, 8960, 14336, 28672])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--model", help="folder of a dense model (default: none)")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pattern, rows = NMPattern.parse(args.pattern), []
    print(f"{'score':<40} {'seconds':>8} {'gain %':>8}")
    for name, score in scores(args):
        score = score.to(args.device)
        began = time.perf_counter()
        order = channel_order(score, pattern)
        float(order[0])  # a GPU is done when it is read
        seconds = time.perf_counter() - began
        gain = kept_score(score[:, order], pattern) / kept_score(score, pattern) - 1
        rows.append({"score": name, "seconds": seconds, "gain": gain})
        print(f"{name:<40} {seconds:8.2f} {100 * gain:8.3f}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
