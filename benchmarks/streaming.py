"""Peak memory of pruning from disk to disk: write a random Llama, one block at a time, and prune it by the command.

    python benchmarks/streaming.py FOLDER --layers 36 --hidden 2560 --intermediate 8192

Prints the dense bytes, the peak resident memory of the command, its seconds, and whether the result inspects clean.
`--limit` is for what the command allocates.
FOLDER needs room for the dense model and the packed one. Without `--refit` weights stay as they are, since values
that mean nothing need no fitting; memory is then that of the mask.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from accelerate.utils.modeling import convert_file_size_to_int
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.measure import processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to work in; it gets `dense` and `packed`")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--memory-budget", default="8GiB", help="for hidden states")
    parser.add_argument("--limit", metavar="SIZE", help="most memory of its own that the command can get (RLIMIT_DATA)")
    parser.add_argument("--refit", action="store_true", help="fit the weights that stay, as `fast` does")
    args = parser.parse_args()

    dense, packed = args.folder / "dense", args.folder / "packed"
    if not (dense / "config.json").exists():
        write_model(dense, args)
    text = args.folder / "text.txt"
    words = torch.randint(args.vocabulary, (args.num_samples * args.seq_len * 2,), generator=torch.Generator())
    text.write_text(" ".join(f"w{word}" for word in words.tolist()))
    command = [sys.executable, "-m", "optimum_eggs", "prune", dense, packed, "--calibration", text, "--overwrite"]
    command += ["--num-samples", args.num_samples, "--seq-len", args.seq_len, "--memory-budget", args.memory_budget]
    command += ["--preset", "fast" if args.refit else "ria"]
    limit = convert_file_size_to_int(args.limit) if args.limit else resource.RLIM_INFINITY

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began = time.monotonic()
    with psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, preexec_fn=limited) as run:
        peak = 0
        while run.poll() is None:
            peak = max(peak, peak_of(run.pid))
            time.sleep(0.05)
    if run.returncode:
        raise SystemExit(run.returncode)
    seconds = time.monotonic() - began
    found = inspect_checkpoint(packed, progress=False)
    if not found.ok:
        raise SystemExit(f"the result is damaged: {found.violations[0]}")
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (dense, packed)]
    print(f"{processor()}, {args.layers} blocks of hidden size {args.hidden}, {'fast' if args.refit else 'ria'}")
    print("| dense | packed | limit | peak memory | dense / peak | seconds | layers, inspected clean |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    dense_size, packed_size, peak_size = (f"{size / 2**30:.2f} GiB" for size in (*sizes, peak))
    row = [dense_size, packed_size, args.limit or "none", peak_size, f"{sizes[0] / peak:.1f}", f"{seconds:.0f}"]
    print(f"| {' | '.join(row)} | {len(found.layers)} |")


def peak_of(pid: int) -> int:
    """Most resident bytes that a process had so far, as the kernel counts them."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A random Llama in bfloat16, a file for every block, and a tokenizer of as many words."""
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        block = name.split(".")[2] if ".layers." in name else "outside"
        if name != "lm_head.weight":
            parts.setdefault(block, {})[name] = value
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for block, empty in parts.items():
        file = f"model-{block}.safetensors"
        tensors = {
            name: torch.ones(value.shape, dtype=torch.bfloat16)
            if value.dim() == 1
            else torch.randn(value.shape, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()
            for name, value in empty.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(args.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
