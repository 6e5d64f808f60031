"""Finding the list of blocks of a model by its structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from ..nn import is_dense_linear, is_packed
from .context import text_inputs


@dataclass(frozen=True)
class BlockList:
    """A model's blocks in order: `name` is the dotted name of the list (`"model.layers"`)."""

    name: str
    blocks: list[nn.Module]

    def block_name(self, index: int) -> str:
        """Dotted name of block `index` within the model."""
        return f"{self.name}.{index}"


def find_block_list(model: nn.Module, name: str | None = None) -> BlockList:
    """The list of blocks that a text passes through.

    It is the outermost `nn.ModuleList` whose members hold linear layers. Where there are several (a vision tower
    beside a language model), it is the one that runs when the model is given two tokens.

    Args:
        model: The model.
        name: Dotted name of the list, if it is known.

    Raises:
        ConfigError: `name` is not the name of an `nn.ModuleList`.
        ModelError: there is no such list, or text runs through more than one.
    """
    lists = dict(_outermost_lists(model, ""))
    if name is not None:
        named = dict(model.named_modules()).get(name)
        if not isinstance(named, nn.ModuleList) or not len(named):
            raise ConfigError(f"block_list={name!r} is no list of blocks of this model; pass one of {sorted(lists)}")
        return BlockList(name, list(named))
    if len(lists) > 1:
        ran = _lists_that_run(model, lists)
        lists = {key: value for key, value in lists.items() if key in ran}
    if len(lists) != 1:
        what = (
            f"text runs through {sorted(lists)}, and one list is pruned; name it with `block_list`"
            if lists
            else "it has no nn.ModuleList with linear layers inside; only models built of such a list can be pruned"
        )
        raise ModelError(f"{type(model).__name__}: cannot tell its list of blocks: {what}")
    found, members = lists.popitem()
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", len(members))
    if len(members) == 1 and layers != 1:
        raise ModelError(
            f"{type(model).__name__}: {found} is one block that runs {layers} times; blocks that share weights cannot "
            "be pruned"
        )
    return BlockList(found, list(members))


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        linear = any(is_dense_linear(inner) or is_packed(inner) for inner in child.modules())
        if isinstance(child, nn.ModuleList) and linear:
            yield full, child
        else:
            yield from _outermost_lists(child, f"{full}.")


@torch.no_grad()
def _lists_that_run(model: nn.Module, lists: dict[str, nn.ModuleList]) -> set[str]:
    ran: set[str] = set()
    handles = [
        member.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
        for name, members in lists.items()
        for member in members
    ]
    device = next(model.parameters()).device
    try:
        model(**text_inputs(model, torch.arange(2, device=device)[None]))
    except Exception as error:  # whatever a foreign forward raises, it means the same here
        raise ModelError(
            f"{type(model).__name__} does not run on token ids alone, so its list of blocks cannot be found by "
            f"running it: {error}; name it with `block_list`"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return ran
