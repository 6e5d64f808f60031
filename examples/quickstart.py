"""Prune a model to 2:4 on a text of your own, save it packed, load it back with transformers, and let it speak.

    python examples/quickstart.py MODEL OUT --text examples/data/calibration.txt

MODEL is a folder or an id on the Hub. `examples/demo.py` does the same with a model that comes from a package.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_eggs import EGGSConfig, EGGSPruner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a dense model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--text", required=True, help="text file to calibrate on")
    parser.add_argument("--preset", default="fast", help="`best` takes two to three times as long")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each")
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()

    pruner = EGGSPruner.from_pretrained(args.model)
    config = EGGSConfig("2:4", preset=args.preset, num_samples=args.num_samples, seq_len=args.seq_len)
    report = pruner.prune(config, calibration=args.text)
    pruner.save_pretrained(args.output)
    print(report)
    weakest = min(report.layers, key=lambda layer: layer.certificate.input_degree_min / layer.out_features)
    print(
        f"the weakest input of all, in {weakest.name}, keeps {weakest.certificate.input_degree_min} of "
        f"{weakest.out_features} outputs"
    )

    model = AutoModelForCausalLM.from_pretrained(args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    with torch.no_grad():
        ids = model.generate(**tokenizer(args.prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
