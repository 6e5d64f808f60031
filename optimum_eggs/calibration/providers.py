"""Where the blocks of a model come from: all in memory, or one at a time from somewhere else."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .blocks import BlockList
from .context import text_inputs


class BlockProvider(Protocol):
    """Where blocks come from: all in memory, or one at a time from somewhere else."""

    def __len__(self) -> int:
        """Number of blocks."""

    def skeleton(self, index: int) -> nn.Module:
        """Block `index`, with or without its weights."""

    def materialise(self, index: int) -> nn.Module:
        """Block `index`, ready to run."""

    def release(self, index: int) -> None:
        """Block `index` is done with."""

    def entered(self) -> None:
        """All windows are before the first block: what is outside the blocks is done with."""

    def run(self, window: Tensor) -> None:
        """Run the whole model on windows (batch, tokens); the walk replaces what its blocks do."""

    def generate(self, prompts: Tensor, **options: Any) -> Tensor:
        """What transformers' `generate` makes of prompts (batch, tokens), with all of the model."""


class InMemoryBlocks:
    """The blocks of a model that is in memory as a whole."""

    def __init__(self, model: Any, block_list: BlockList) -> None:
        self.model, self.blocks = model, block_list.blocks
        self.device = next(model.parameters()).device

    def __len__(self) -> int:
        return len(self.blocks)

    def skeleton(self, index: int) -> nn.Module:
        """Block `index`."""
        return self.blocks[index]

    def materialise(self, index: int) -> nn.Module:
        """Block `index`; it is there already."""
        return self.blocks[index]

    def release(self, index: int) -> None:
        """Nothing: the block stays."""

    def entered(self) -> None:
        """Nothing: the rest of the model stays too."""

    def run(self, window: Tensor) -> None:
        """Run the model on windows (batch, tokens)."""
        self.model(**text_inputs(self.model, window.to(self.device)))

    def generate(self, prompts: Tensor, **options: Any) -> Tensor:
        """What transformers' `generate` makes of prompts (batch, tokens)."""
        ids = prompts.to(self.device)
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
