"""Prune with a score of your own, and compare it with RIA on another text.

    python examples/custom_importance.py MODEL --text examples/data/calibration.txt --judge examples/data/judge.txt

The score decides which weights stay; the floor, the refit of the weights that stay and the storage are the package's. A
model pruned with it stores the score's name alone, and loads where nobody has registered it.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from optimum_eggs import EGGSConfig, EGGSPruner, register_importance
from optimum_eggs.evaluation import perplexity
from optimum_eggs.evaluation.windows import evaluation_windows


def balanced_wanda(weight: Tensor, input_norm: Tensor, exponent: float) -> Tensor:
    """Wanda's |W|·‖x‖ as a share of its row plus its share of its column: every output and every input counts alike.

    weight (out, in), input_norm (in,); `exponent` is for scores that have one. Returns (out, in).
    """
    energy = weight.abs() * input_norm
    rows = energy.sum(dim=1, keepdim=True).clamp_min(1e-30)
    columns = energy.sum(dim=0, keepdim=True).clamp_min(1e-30)
    return energy / rows + energy / columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a dense model")
    parser.add_argument("--text", required=True, help="text file to calibrate on")
    parser.add_argument("--judge", required=True, help="text file to judge on")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each window")
    parser.add_argument("--num-windows", type=int, default=8, help="windows to judge on")
    args = parser.parse_args()

    register_importance("balanced_wanda", balanced_wanda)
    for importance in ("ria", "balanced_wanda"):
        pruner = EGGSPruner.from_pretrained(args.model, dtype="float32")
        config = EGGSConfig(
            "2:4", solver="score", importance=importance, num_samples=args.num_samples, seq_len=args.seq_len
        )
        report = pruner.prune(config, calibration=args.text)
        windows = evaluation_windows(args.judge, pruner.tokenizer, args.seq_len, args.num_windows)
        found = perplexity(pruner.model, windows).perplexity
        print(f"{importance:<16} mean relative error {report.mean_relative_error:.4f}  perplexity {found:.2f}")


if __name__ == "__main__":
    main()
