"""What merging a plain LoRA into a packed model costs: perplexity before it, under it, and merged.

The adapter is PEFT's, on all packed layers, trained by transformers' `Trainer` on the first windows of a text; another
text judges. That every mask stays is asserted before anything is printed.

    OMP_NUM_THREADS=2 python benchmarks/merging.py packed packed-int8 --train wiki.valid.raw --text wiki.test.raw
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from optimum_eggs.measure import processor


def merged(folder: Path, args: argparse.Namespace) -> list[float]:
    """The three perplexities."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

    from optimum_eggs.evaluation import perplexity
    from optimum_eggs.evaluation.windows import evaluation_windows
    from optimum_eggs.nn import packed_layers

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows(args.train, tokenizer, args.seq_len, args.steps * args.batch_size)
    judge = evaluation_windows(args.text, tokenizer, args.test_seq_len, args.test_windows)
    masks = [layer.mask() for layer in packed_layers(model).values()]
    found = [perplexity(model, judge, progress=False).perplexity]
    config = LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as work:
        training = TrainingArguments(
            work,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, training, train_dataset=[{"input_ids": ids, "labels": ids} for ids in windows])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    found.append(perplexity(model, judge, progress=False).perplexity)
    model = model.merge_and_unload()
    assert all(map(torch.equal, masks, (layer.mask() for layer in packed_layers(model).values())))
    return [*found, perplexity(model, judge, progress=False).perplexity]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of packed models")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to judge by")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--test-windows", type=int, default=8)
    parser.add_argument("--test-seq-len", type=int, default=512)
    args = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads\n")
    print("| model | before | under the adapter | merged |\n|---|---:|---:|---:|")
    for folder in args.models:
        before, adapted, after = merged(folder, args)
        print(f"| {folder.name} | {before:.2f} | {adapted:.2f} | {after:.2f} |", flush=True)


if __name__ == "__main__":
    main()
