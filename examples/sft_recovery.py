"""Train a plain LoRA on a packed model with TRL's SFTTrainer, merge it, and save the model, packed again.

    pip install -e '.[peft]' trl  # in a clone of the repository
    python examples/sft_recovery.py PACKED OUT --text examples/data/calibration.txt --steps 50

Nothing in the calls is this package's: importing it is enough for the LoRA to keep the zeros.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import optimum_eggs  # noqa: F401  # makes transformers and PEFT know packed layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a packed model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--text", required=True, help="text file to train on, a document a line")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    stored = AutoConfig.from_pretrained(args.model).dtype
    packed = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    lines = [line for line in Path(args.text).read_text(encoding="utf-8").splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=packed,
            args=SFTConfig(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                max_length=args.seq_len,
                packing=True,
                packing_strategy="wrapped",
                learning_rate=1e-3,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=Dataset.from_dict({"text": lines}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        model: Any = trainer.model

    merged = model.merge_and_unload()  # packed, under the same mask
    merged.to(stored).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
