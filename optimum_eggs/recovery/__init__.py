"""Getting quality back without losing a zero: masked LoRA through PEFT."""

from .install import install_in_peft

__all__ = ["install_in_peft"]
