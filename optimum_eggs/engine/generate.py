"""Calibration windows that the dense model writes itself, behind the beginnings of others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..calibration import BlockProvider
from ..errors import EGGSError, ModelError, first_line, is_out_of_memory
from ..ranks import ALONE, Ranks
from .estimate import duration

_PROMPTS = (32, 1)  # tokens of a prompt: half of the windows stay near the text, half are what else the model knows
_TOGETHER = 32  # windows written at a time


def check_generates(model: Any, what: str) -> None:
    """Raise unless a model goes on with a text, which `what` needs.

    Raises:
        ModelError: it is no decoder with a head.
    """
    alone = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not (alone and hasattr(model, "can_generate") and model.can_generate()):
        raise ModelError(f"{what}: {type(model).__name__} cannot go on with a text by itself; use generated_samples=0")


@torch.no_grad()
def generated_windows(
    model: Any,
    blocks: BlockProvider,
    windows: Tensor,
    count: int,
    seed: int,
    ranks: Ranks = ALONE,
    progress: bool | None = None,
) -> Tensor:
    """Token ids (count, tokens): a prompt from a random place in `windows`, and what the dense model writes behind.

    Prompts are of 32 tokens for the first half of the windows, and of one for the others. What is behind is drawn from
    the model's own distribution (temperature 1, no token is cut off but the one that ends a text): calibration text as
    of Williams et al. 2025 (arXiv 2410.17170). The same again for the same seed on the same machine. The generators of
    torch are as before.

    Memory: keys and values of 32 windows, and activations of one token of each; more only while prompts are read.

    Args:
        model: The dense model.
        blocks: The provider of its blocks.
        windows: Token ids (windows, tokens), int64; of fewer than 64 tokens, half are the longest prompt.
        count: How many to write.
        seed: Of the places and of what is drawn.
        ranks: The processes over which they are dealt out.
        progress: As for `prune_model`.

    Raises:
        ModelError: the model cannot write them.
    """
    batches, length = _prompts(windows, count, seed), windows.shape[1]
    hide = ranks.hide_bar(progress)
    mine: dict[str, Tensor] = {}
    own = range(ranks.rank, len(batches), ranks.size)
    tokens = sum(len(batches[number]) * (length - batches[number].shape[1]) for number in own)
    with ranks.together(), tqdm(total=tokens, desc="Writing windows", unit="token", disable=hide) as bar:
        told = _Teller(bar, count, announced=progress is False or not ranks.first)
        for number in own:
            with _plain_sampling(model), _seeded((seed * 10_007 + number) % 2**63):
                written = _write(model, blocks, batches[number], length, told)
            mine[str(number)] = written
    found = ranks.merge(mine)
    return torch.cat([found[str(number)] for number in range(len(batches))])


def _prompts(windows: Tensor, count: int, seed: int) -> list[Tensor]:
    """Prompts (batch, tokens) from random places in windows (windows, tokens), as many as are written together."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for part, most in zip((count - count // 2, count // 2), _PROMPTS, strict=True):
        size = min(most, windows.shape[1] // 2)
        rows = torch.randint(len(windows), (part,), generator=generator)
        starts = torch.randint(windows.shape[1] - size + 1, (part,), generator=generator)
        batches += windows.unfold(1, size, 1)[rows, starts].split(_TOGETHER) if part else ()
    return batches


def _write(model: Any, blocks: BlockProvider, prompts: Tensor, length: int, tick: Callable[..., Tensor]) -> Tensor:
    """Prompts (windows, tokens) and what the model writes behind them, (windows, length)."""
    new = length - prompts.shape[1]
    try:
        written = blocks.generate(
            prompts, max_new_tokens=new, min_new_tokens=new, stopping_criteria=[tick], use_cache=True
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, EGGSError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"generated_samples: {type(model).__name__} cannot write windows ({first_line(error)}); use "
            "generated_samples=0"
        ) from error
    return written.cpu()


@contextmanager
def _plain_sampling(model: Any) -> Iterator[None]:
    """The model's own distribution in place of what its checkpoint recommends for sampling."""
    from transformers import GenerationConfig

    recommended = model.generation_config
    ids = {"bos_token_id": recommended.bos_token_id, "eos_token_id": recommended.eos_token_id, "pad_token_id": 0}
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    try:
        yield
    finally:
        model.generation_config = recommended


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators of torch begin at `seed`, and are put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class _Teller:
    """A stopping criterion that stops nothing: it moves a bar, and says once how long all will take."""

    def __init__(self, bar: tqdm, count: int, announced: bool) -> None:
        self._bar, self._count, self._announced = bar, count, announced
        self._steps, self._begun = 0, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        self._bar.update(len(input_ids))
        self._steps += 1
        if self._steps == 1:
            self._begun = time.perf_counter()
        if self._steps == 3 and not self._announced:
            seconds = (time.perf_counter() - self._begun) / 2 / len(input_ids) * self._bar.total
            line = f"the dense model writes {self._count} calibration windows first: about {duration(seconds)}"
            tqdm.write(line, file=sys.stderr)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
