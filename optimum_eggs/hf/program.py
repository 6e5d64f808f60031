"""A compiled decoding step that asks once a call of `generate`, not once a token, whether the model has changed.

`torch.compile` checks before each call all that it took for granted, which for a model of some billions of parameters
are ten thousand attributes of modules and takes as long as twenty of its products. Nothing changes a model while it
generates; so the attributes are compared here, at the first token of each generation, and torch checks the rest: what
is given to the call, the cache, and what is global.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import count
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Program:
    state: list[Any]
    step: Callable[..., Any]
    whole: bool


_KEPT = 4  # programs of a model: adapters that take turns have one each
_PROGRAMS: WeakKeyDictionary[nn.Module, list[_Program]] = WeakKeyDictionary()
_STEPS = count()
_ATTRIBUTES_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_COMPARED_AS_THEY_ARE = (bool, int, float, str, bytes, Enum, torch.dtype, torch.device, BuiltinFunctionType)


def compiled_step(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's call, compiled, for one generation: by a program that was made when the model was as it is now."""
    program: _Program | None = None

    def step(**inputs: Any) -> Any:
        nonlocal program
        if program is None:  # now, not before the prompt was read, which may change a model too
            state = model_state(model)
            program = next((kept for kept in _PROGRAMS.get(model, ()) if kept.state == state), None)
            program = program or _new(state, whole=compiles_whole(model))
            _keep(model, program)
        exceptions = torch._dynamo.exc
        try:
            return program.step(model, **inputs)
        except exceptions.FailOnRecompileLimitHit:
            if not program.whole:
                raise
            # torch keeps eight programs of a function, for as many shapes of its inputs: a new function has room again.
            program = _new(program.state, whole=True)
        except (exceptions.Unsupported, exceptions.UserError) as error:
            if not program.whole:
                raise
            reason = str(error).strip().partition("\n")[0]
            logging.getLogger(__name__).warning(
                "%s is compiled in parts, which is slower to call: %s", type(model).__name__, reason
            )
            program = _new(program.state, whole=False)
        _keep(model, program)
        return program.step(model, **inputs)

    return step


def forget(model: nn.Module) -> None:
    """Let go of what was compiled."""
    _PROGRAMS.pop(model, None)


def _keep(model: PreTrainedModel, program: _Program) -> None:
    """In place of one for the same state, or of the one that was not used for longest."""
    others = [kept for kept in _PROGRAMS.get(model, ()) if kept.state != program.state]
    _PROGRAMS[model] = [*others, program][-_KEPT:]


def _new(state: list[Any], whole: bool) -> _Program:
    from .joining import JoinProducts  # imports the compiler

    options: Any = {"post_grad_custom_pre_pass": JoinProducts()}
    if whole:
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        options["size_asserts"] = False  # a thousand for each token, of tensors whose shapes guards and state know
    step = torch.compile(_function_of_its_own(), fullgraph=whole, options=options)
    return _Program(state, step, whole)


def _step(model: PreTrainedModel, **inputs: Any) -> Any:
    return model(**inputs)


def _function_of_its_own() -> Callable[..., Any]:
    """`_step` with code of its own: torch finds programs by their code, and unchecked ones are for one model alone."""
    code = _step.__code__.replace(co_name=f"step_{next(_STEPS)}")
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
    """What a program may take for granted of a model, to be compared with `==`.

    These are the attributes of all modules and their configurations: plain values as they are, functions by their code
    and what they hold, shapes, strides, dtypes and devices of tensors (a program reads their values where they are),
    which tensors and modules are the same, and of other objects the class. Nothing in it refers to the model.
    """
    met: dict[int, int] = {}  # numbers of what may be met twice, in order
    found = []
    for module in model.modules():
        names = list(vars(module))
        if module is model:  # generate() keeps notes of its own there
            names = [name for name in names if not name.startswith("_") or name in _ATTRIBUTES_OF_ANY_MODULE]
        attributes = {name: _plain(vars(module)[name], met) for name in names}
        found.append((type(module), type(module).forward, attributes))
    return found


def _plain(value: Any, met: dict[int, int]) -> Any:
    if value is None or isinstance(value, _COMPARED_AS_THEY_ARE):
        return value
    if isinstance(value, FunctionType):
        known = id(value) in met  # it may hold itself
        which = met.setdefault(id(value), len(met))
        held = value.__defaults__, value.__kwdefaults__, value.__closure__
        return which if known else (which, value.__code__, _plain(held, met))
    if isinstance(value, CellType):
        return _plain(value.cell_contents, met) if _is_filled(value) else CellType
    if isinstance(value, partial):
        return partial, _plain((value.func, value.args, value.keywords), met)
    if isinstance(value, MethodType):
        return MethodType, _plain((value.__func__, value.__self__), met)
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else None
        which = met.setdefault(id(value), len(met))
        return which, type(value), value.shape, strides, value.dtype, value.device, value.requires_grad
    if isinstance(value, nn.Module):
        return type(value), met.setdefault(id(value), len(met))
    if isinstance(value, PreTrainedConfig):
        known = id(value) in met
        which = met.setdefault(id(value), len(met))
        return which if known else (which, _plain(vars(value), met))
    if isinstance(value, dict):  # hooks have numbers for keys, which are new at every registration
        return [(None if isinstance(key, int) else key, _plain(item, met)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return [_plain(item, met) for item in value]
    settings = getattr(type(value), "__dataclass_params__", None)
    if settings is not None and settings.frozen and settings.eq:
        return value  # compared by its fields
    return type(value)


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
