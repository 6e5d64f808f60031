"""What a training step costs: tokens a second and peak memory, packed (masked LoRA, values) beside dense (plain LoRA).

Each kind runs in a process of its own over float32 weights, with the loss of the text, in bfloat16 autocast where
`optimum-cli eggs recover` would use it or as `--products` says. Memory is the peak while training over what was
resident once the model was loaded.

    OMP_NUM_THREADS=2 python benchmarks/training.py twin/packed --against twin/dense
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from optimum_eggs.measure import Meter, processor

KINDS = ("dense-lora", "lora", "values")


def worker(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, their range, and the memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from optimum_eggs.engine.precision import has_bfloat16_products
    from optimum_eggs.hf.loading import own_memory
    from optimum_eggs.malloc import keep_freed_memory
    from optimum_eggs.nn import packed_layers

    keep_freed_memory()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.against if kind == "dense-lora" else args.model, dtype=torch.float32
    )
    own_memory(model)
    names = list(packed_layers(AutoModelForCausalLM.from_pretrained(args.model)))
    if kind == "values":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in names)
    else:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (args.batch_size, args.seq_len))
    cpu, seconds = torch.device("cpu"), []
    half = has_bfloat16_products(cpu) if args.products == "auto" else args.products == "bfloat16"
    with Meter() as meter:
        for _ in range(args.steps + args.warm_up):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    assert torch.isfinite(loss)
    measured = meter.summary()
    timed = seconds[args.warm_up :]
    return {
        "kind": kind,
        "seconds": statistics.median(timed),
        "low": min(timed),
        "high": max(timed),
        "memory": measured["peak_rss"] - measured["rss_before"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a packed model")
    parser.add_argument("--against", required=True, help="folder of the dense model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--products", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args)))
        return
    print(f"{processor()}, {args.batch_size} x {args.seq_len} tokens a step\n")
    print("| what is trained | tokens/s (slowest-fastest) | memory beyond the model |")
    print("|---|---:|---:|")
    for kind in args.kinds:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", kind]
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        tokens = args.batch_size * args.seq_len
        speed = f"{tokens / row['seconds']:.0f} ({tokens / row['high']:.0f}-{tokens / row['low']:.0f})"
        print(f"| {kind} | {speed} | {row['memory'] / 1e6:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
