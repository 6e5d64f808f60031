"""The operations without derivatives: each is defined twice, for its kernel hands on what it does not take."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import native

LIBRARY = torch.library.Library("optimum_eggs", "FRAGMENT")


def define(name: str, arguments: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define the operation `name`, and `name`_by_python, which is `run` on every device."""
    for own in (name, f"{name}_by_python"):
        LIBRARY.define(f"{own}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(own, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"optimum_eggs::{own}", fake, lib=LIBRARY)


def register() -> str | None:
    """Give the operations, all of which are defined, their kernels for the CPU; or say why they have none."""
    return native.register("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
