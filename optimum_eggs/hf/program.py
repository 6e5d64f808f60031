"""A compiled decoding step that asks once a call of `generate`, not once a token, whether the model has changed.

`torch.compile` checks before each call all that it took for granted, which for a model of some billions of parameters
are ten thousand attributes of modules and takes as long as twenty of its products. Nothing changes a model while it
generates; so the attributes are compared here, between two generations, and torch checks the rest: what is given to the
call, the cache, and what is global.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import count
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Program:
    state: list[Any]
    step: Callable[..., Any]


_PROGRAMS: WeakKeyDictionary[nn.Module, _Program] = WeakKeyDictionary()
_NUMBERS = count()
_OF_MODULES = frozenset(vars(nn.Module()))


def compiled_step(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's call, compiled: the program of the last time if nothing of the model has changed since."""
    state = model_state(model)
    program = _PROGRAMS.get(model)
    if program is None or program.state != state:
        _compile(model, state, whole=compiles_whole(model))
    return partial(_run, model)


def _compile(model: PreTrainedModel, state: list[Any], whole: bool) -> None:
    unchecked: Any = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "size_asserts": False,  # a thousand for each token, of tensors whose shapes the guards and the state know
    }
    _PROGRAMS[model] = _Program(
        state, torch.compile(_own_step(), fullgraph=whole, options=unchecked if whole else None)
    )


def _run(model: PreTrainedModel, **inputs: Any) -> Any:
    program = _PROGRAMS[model]
    try:
        return program.step(model, **inputs)
    except FailOnRecompileLimitHit:  # as many shapes of inputs as torch allows: from the beginning
        _compile(model, program.state, whole=True)
    except Unsupported as error:
        reason = str(error).strip().partition("\n")[0]
        logging.getLogger(__name__).warning(
            "%s is compiled in parts, which is slower to call: %s", type(model).__name__, reason
        )
        _compile(model, program.state, whole=False)
    return _PROGRAMS[model].step(model, **inputs)


def _step(model: PreTrainedModel, **inputs: Any) -> Any:
    return model(**inputs)


def _own_step() -> Callable[..., Any]:
    """`_step` with code of its own: torch finds programs by their code, and unchecked ones are for one model alone."""
    code = _step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
    return FunctionType(code, _step.__globals__)


def compiles_whole(model: nn.Module) -> bool:
    """Whether the step is sure to be one program: no hooks, and no positions that depend on the length so far.

    Parts of an interrupted program are found by code that models share, so each must check all that it takes for
    granted.
    """
    for module in model.modules():
        given = vars(module)
        hooked = given["_forward_hooks"] or given["_forward_pre_hooks"] or "forward" in given
        kinds = given.get("rope_type")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if hooked or {"dynamic", "longrope"}.intersection(kinds):
            return False
    return True


def model_state(model: PreTrainedModel) -> list[Any]:
    """What a program may take for granted of a model, to be compared with `==`: plain values, and kinds of the others.

    Of tensors these are shapes, strides, dtypes and devices: a program reads the values where they are.
    """
    found: list[Any] = [model.config.to_dict()]
    for module in model.modules():
        names = list(vars(module))
        if module is model:  # generate() keeps notes of its own there
            names = [name for name in names if not name.startswith("_") or name in _OF_MODULES]
        found.append((type(module), {name: _plain(vars(module)[name]) for name in names}))
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if is_dataclass(value) and value.__hash__ is not None:
        return value  # frozen, and compared by its fields
    return type(value)
