"""Where work is done: chosen once, for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device to work on.

    Args:
        device: Its name, as torch has it; or `"auto"`, an accelerator if there is one that computes in float64, as
            factorisations do, else the CPU.

    Raises:
        ConfigError: there is no such device.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    import torch

    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and _has_float64(found) else torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        raise ConfigError(
            f"device={str(device)!r} cannot be used ({first_line(error)}); leave it out for an accelerator if there is "
            "one, or name cpu"
        ) from error
    return found


def device_map(device: torch.device) -> torch.device | None:
    """The argument of transformers' `from_pretrained` for a device; nothing for the CPU, where it loads by itself."""
    return None if device.type == "cpu" else device


def described(device: torch.device) -> str:
    """A device in words, as in a line about what is used.

    >>> import torch
    >>> described(torch.device("cpu")).startswith("cpu, ")
    True
    """
    import torch

    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _has_float64(device: torch.device) -> bool:
    import torch

    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):  # as on Apple's GPUs
        return False
    return True
