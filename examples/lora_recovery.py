"""Train a plain PEFT LoRA on a packed model with transformers' Trainer, merge it, and save the model, packed again.

    pip install -e '.[peft]'  # in a clone of the repository
    python examples/lora_recovery.py PACKED OUT --text examples/data/calibration.txt --steps 50

Nothing in the calls is this package's: importing it is enough for the LoRA to keep the zeros.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import optimum_eggs  # noqa: F401  # makes transformers and PEFT know packed layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a packed model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--text", required=True, help="text file to train on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    stored = AutoConfig.from_pretrained(args.model).dtype
    packed = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model: Any = get_peft_model(
        packed, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.print_trainable_parameters()

    text = Path(args.text).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_steps=10,
        )
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=dataset).train()

    merged = model.merge_and_unload()  # packed, under the same mask
    merged.to(stored).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
