"""Whole models in the programs that a user would pick: size, memory, perplexity and speed, on one machine in one run.

    python benchmarks/peers.py qwen15 --gguf qwen15.gguf --text wiki.test.raw --ours '2:4 int8=out8' '2:4 int4=out4'
        --python llama=llama/bin/python bitsandbytes=bnb/bin/python

Every program runs a model in processes of its own, by the Python given for it; one that is not installed there is
skipped by its name. All get the same token ids. In every round each program in turn loads its model and times prefill
of 256 tokens, with the logits of the last, and decoding of 64 behind one, so that a machine which slows down slows all
of them; in the first round it then gives the perplexity. Packed models read what they are judged on by eight tokens at
a time, since kernels for few tokens, which decoding runs, round what integers are multiplied by. Those of `--compiled`
decode by `compile_generation`. Medians over all
repeats of all rounds are printed, and ratios to `--base`. Resident memory is what the process holds after the timing
beyond what it held before the model was loaded.

llama.cpp's files are made from the GGUF file: BF16 of it, and the others of BF16. A file is what `save_pretrained`
writes, or the GGUF file. Bits a weight are those of the file by the parameters of the dense model. Rows are written to
the JSON as they come; `--table` prints those of a file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LLAMA = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
"""Formats of llama.cpp and their numbers in its `llama_ftype`."""

HF = ["dense", "bitsandbytes-int8", "bitsandbytes-nf4", "torchao-int8"]


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(run: Any, repeats: int) -> list[float]:
    """Seconds of each of some runs, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found


def in_transformers(args: argparse.Namespace, windows: list[list[int]]) -> dict[str, Any]:
    """The row of a model that transformers loads: ours, dense, or as bitsandbytes and torchao quantise it."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    kind, path = args.worker
    options: dict[str, Any] = {}
    if kind in ("ours", "compiled"):
        import optimum_eggs  # makes transformers know the format
    elif kind.startswith("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = BitsAndBytesConfig(**four if "nf4" in kind else {"load_in_8bit": True})
    elif kind.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    before = rss()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu", **options).eval()
    if kind == "compiled":
        optimum_eggs.compile_generation(model)
    row: dict[str, Any] = {}
    prompt = torch.tensor([windows[0][: args.prompt]])
    start = prompt[:, :1]
    sampling = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    few = 8 if kind in ("ours", "compiled") else args.seq_len  # tokens at a time: as many as kernels that decode take
    with torch.no_grad():
        row["prefill"] = timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1), args.repeats)
        model.generation_config.eos_token_id = None  # no token ends it, as in llama.cpp's loop
        row["decode"] = timed(lambda: model.generate(start, max_new_tokens=args.new_tokens, **sampling), args.repeats)
        row["rss"] = rss() - before
        if args.judge:
            losses = []
            for window in windows:
                cache = DynamicCache(config=model.config)
                logits = [
                    model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float()
                    for ids in torch.tensor([window]).split(few, 1)
                ]
                scores = torch.cat(logits).log_softmax(-1)
                losses += (-scores[:-1].gather(1, torch.tensor(window)[1:, None])).flatten().tolist()
            row["loss"] = statistics.fmean(losses)
            row["bytes"] = saved(model, args.work)
    return row


def saved(model: Any, work: Path) -> int:
    """Bytes of the weight files that a model is saved in."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir() if file.suffix in (".safetensors", ".bin"))


def in_llama_cpp(args: argparse.Namespace, windows: list[list[int]]) -> dict[str, Any]:
    """The row of a GGUF file in llama.cpp."""
    import llama_cpp
    import numpy as np

    _, path = args.worker
    before = rss()
    threads = int(os.environ["OMP_NUM_THREADS"])
    options = {"n_threads": threads, "n_threads_batch": threads, "verbose": False, "n_ctx": 1024, "n_batch": 1024}
    row: dict[str, Any] = {"bytes": Path(path).stat().st_size}
    model = llama_cpp.Llama(path, **options)

    def prefill() -> None:
        model.reset()
        model.eval(windows[0][: args.prompt])

    def decode() -> None:
        model.reset()
        model.eval(windows[0][:1])
        for _ in range(args.new_tokens - 1):
            model.eval([model.sample(temp=0.0)])

    row["prefill"], row["decode"] = timed(prefill, args.repeats), timed(decode, args.repeats)
    row["rss"] = rss() - before
    model.close()
    if args.judge:
        judge = llama_cpp.Llama(path, logits_all=True, **options)
        losses = []
        for window in windows:
            judge.reset()
            judge.eval(window)
            logits = np.asarray(judge.scores[: len(window)], dtype=np.float64)
            logits -= logits.max(1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            losses += (-logits[np.arange(len(window) - 1), window[1:]]).tolist()
        row["loss"] = statistics.fmean(losses)
        judge.close()
    return row


def make_gguf(source: str, folder: Path, python: str, formats: list[str]) -> dict[str, Path]:
    """The files of all formats, made once for each source: another file of the same name is another model."""
    from quality import digest

    folder.mkdir(parents=True, exist_ok=True)
    of_source = f"{Path(source).stem}-{digest([str(Path(source).resolve())])[:8]}"
    files = {
        name: folder / f"{of_source}-{name}.gguf" for name in ["BF16", *(name for name in formats if name != "BF16")]
    }
    for name in files:
        if not files[name].exists():
            made = files[name].with_suffix(".part")
            code = (
                "import llama_cpp, sys\n"
                "p = llama_cpp.llama_model_quantize_default_params()\n"
                "p.ftype, p.allow_requantize = int(sys.argv[3]), True\n"
                "sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
            )
            begin = source if name == "BF16" else str(files["BF16"])
            subprocess.run([python, "-c", code, begin, str(made), str(LLAMA[name])], check=True, capture_output=True)
            made.rename(files[name])
    return {name: files[name] for name in formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the dense model")
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=FOLDER", help="packed models of it")
    parser.add_argument(
        "--compiled", nargs="*", default=[], metavar="NAME=FOLDER", help="and such that decode compiled"
    )
    parser.add_argument("--gguf", help="the same model as a GGUF file, for llama.cpp")
    parser.add_argument("--work", type=Path, default=Path("gguf"), help="folder for what is made of it (default: gguf)")
    parser.add_argument("--peers", nargs="*", default=HF, choices=HF, help="other programs (default: all)")
    parser.add_argument("--llama", nargs="*", default=list(LLAMA), choices=list(LLAMA), help="formats of llama.cpp")
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH", help="a program's own Python")
    parser.add_argument("--text", help="text file to judge on")
    parser.add_argument("--windows", type=int, default=8, help="windows to judge on (default: 8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each (default: 512)")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="in each round")
    parser.add_argument("--base", default="dense", help="whose speed ratios are to (default: dense)")
    parser.add_argument("--marked", nargs="*", default=[], help="rows to mark with * in the table")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--table", type=Path, help="print the table of a file that was written, and measure nothing")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ids", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.table and (args.model is None or args.text is None):
        parser.error("MODEL and --text say what is measured; --table alone prints what was")
    if args.worker:
        windows = json.loads(Path(args.ids).read_text())
        run = in_llama_cpp if args.worker[0].startswith("llama") else in_transformers
        print(json.dumps(run(args, windows)))
        return
    if args.table:
        found = json.loads(args.table.read_text())
        found["marked"] = args.marked or found.get("marked", [])
    else:
        found = measured(args)
    print(f"{found['processor']}, {found['threads']} threads, commit {found['commit']}\n")
    print(table(found, args.base))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all programs."""
    import torch
    from quality import commit, digest
    from transformers import AutoTokenizer

    from optimum_eggs.evaluation.windows import evaluation_windows
    from optimum_eggs.measure import processor

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = args.work / "ids.json"
    args.work.mkdir(parents=True, exist_ok=True)
    ids.write_text(json.dumps(evaluation_windows([text], tokenizer, args.seq_len, args.windows).tolist()))
    pythons = dict(each.split("=", 1) for each in args.python)
    runs = {f"ours {name}": ("ours", folder) for name, folder in (each.split("=", 1) for each in args.ours)}
    named = (each.split("=", 1) for each in args.compiled)
    runs |= {f"ours {name}, compiled": ("compiled", folder) for name, folder in named}
    runs |= {name: (name, args.model) for name in args.peers}
    if args.gguf:
        try:
            files = make_gguf(args.gguf, args.work, pythons.get("llama", sys.executable), args.llama)
            runs |= {f"llama.cpp {name}": ("llama", str(file)) for name, file in files.items()}
        except subprocess.CalledProcessError as error:
            print(f"llama.cpp is left out: {error.stderr.decode()[-200:]}", file=sys.stderr)
    found: dict[str, Any] = {
        "model": Path(args.model).name,
        "text": Path(args.text).name,
        "text_sha256": digest([text]),
    }
    found |= {key: getattr(args, key) for key in ("windows", "seq_len", "prompt", "new_tokens", "rounds", "repeats")}
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of all programs
    found |= {"processor": processor(), "threads": threads, "commit": commit(), "marked": args.marked}
    found |= {"parameters": parameters(Path(args.model)), "rows": []}
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(args.rounds):
        for name, (kind, path) in list(runs.items()):
            python = pythons.get(kind.split("-")[0], sys.executable)
            command = [python, __file__, *sys.argv[1:], "--ids", str(ids), "--worker", kind, str(path)]
            done = subprocess.run([*command, *["--judge"] * (turn == 0)], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} is left out: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                del runs[name]
                continue
            new = json.loads(done.stdout.splitlines()[-1])
            row = rows.setdefault(name, {"name": name} | new | {"prefill": [], "decode": []})
            row["prefill"] += new["prefill"]
            row["decode"] += new["decode"]
            print(f"{turn + 1}: {name}", file=sys.stderr, flush=True)
            found["rows"] = list(rows.values())
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def parameters(folder: Path) -> int:
    """Of a dense model, in its files."""
    from optimum_eggs.packing.checkpoint import read_headers, weight_files

    return sum(math.prod(entry.shape) for entry in read_headers(weight_files(folder)).values())


def table(found: dict[str, Any], base: str) -> str:
    """The rows as a Markdown table: medians, with half the spread between the quartiles as a share."""
    lines = [
        f"| model | bits a weight | file, MB | resident, MB | perplexity | prefill {found['prompt']}, tokens/s "
        f"| decode {found['new_tokens']}, tokens/s | of {base} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    seconds = {row["name"]: statistics.median(row["decode"]) for row in found["rows"]}
    for row in found["rows"]:
        ratio = f"{seconds[base] / seconds[row['name']]:.2f}" if base in seconds else ""
        mark = " \\*" if row["name"] in found.get("marked", ()) else ""
        lines.append(
            f"| {row['name']}{mark} | {bits_a_weight(row, found):.2f} | {row['bytes'] / 1e6:.0f} "
            f"| {row['rss'] / 1e6:.0f} | {math.exp(row['loss']):.2f} | {speed(found['prompt'], row['prefill'])} "
            f"| {speed(found['new_tokens'], row['decode'])} | {ratio} |"
        )
    return "\n".join(lines)


def bits_a_weight(row: dict[str, Any], found: dict[str, Any]) -> float:
    """Of a row's file, by the parameters of the dense model."""
    return 8.0 * row["bytes"] / found["parameters"]


def speed(tokens: int, seconds: list[float]) -> str:
    """Tokens a second by the median, and half the distance of the quartiles as a share of it."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return f"{tokens / middle:.1f} ± {(high - low) / 2 / middle:.0%}"


if __name__ == "__main__":
    main()
