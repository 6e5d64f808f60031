"""Getting quality back without losing a zero: masked LoRA through PEFT."""
