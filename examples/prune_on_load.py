"""Prune while loading, the way transformers quantizes: one argument to `from_pretrained`.

python examples/prune_on_load.py MODEL OUT --text examples/data/calibration.txt
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_eggs import EGGSConfig, NMLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a dense model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--text", required=True, help="text file to calibrate on")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each")
    args = parser.parse_args()

    config = EGGSConfig(
        "2:4",
        calibration=args.text,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        ignore=["lm_head", "layers.0.*"],  # name patterns; here the first block stays dense as well
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)

    loaded = AutoModelForCausalLM.from_pretrained(args.output)
    packed = [name for name, module in loaded.named_modules() if isinstance(module, NMLinear)]
    print(f"{len(packed)} layers are packed, from {packed[0]} to {packed[-1]}")
    loaded.dequantize()
    print(f"made dense again: {type(loaded.get_submodule(packed[0])).__name__}")


if __name__ == "__main__":
    main()
