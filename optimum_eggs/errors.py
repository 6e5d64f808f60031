"""Every error this package raises on purpose, and how their messages are made.

Each message names the thing, its value, the rule it broke and what to do about it. All of them derive from
[`EGGSError`], so `except EGGSError` catches bad input and nothing else.
"""

import re
from collections.abc import Iterator, Sized
from typing import Any, overload


def first_line(error: BaseException) -> str:
    r"""What another library's error says, in one line.

    >>> first_line(ValueError("\nno such thing\ndetails"))
    'no such thing'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shorten(value: Any) -> str:
    """A value for a message, of at most 60 characters.

    >>> shorten("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def with_article(name: str) -> str:
    """The name of a class with what goes before it.

    >>> with_article("Embedding"), with_article("Linear"), with_article("NMLinear")
    ('an Embedding', 'a Linear', 'an NMLinear')
    """
    vowel = re.match(r"[AEIOaeio]|[FHLMNRSX](?=[A-Z])", name)  # of what is spelt out, the first letter's name
    return f"{'an' if vowel else 'a'} {name}"


def more(items: Sized, shown: int) -> str:
    """What to put behind the first items of a list.

    >>> more("abc", 2), more("abc", 3)
    (' and 1 more', '')
    """
    return f" and {len(items) - shown} more" if len(items) > shown else ""


@overload
def without(secret: str | bool | None, said: str) -> str: ...
@overload
def without(secret: str | bool | None, said: Exception) -> Exception | None: ...


def without(secret: str | bool | None, said: str | Exception) -> str | Exception | None:
    """What was said, without a secret in it: of a text that part is left out, of an error all.

    >>> without("hf_abc", "Illegal header value: Bearer hf_abc"), without("hf_abc", ValueError("hf_abc"))
    ('Illegal header value: Bearer ***', None)
    """
    hidden = secret.strip() if isinstance(secret, str) else ""
    forms = {hidden, repr(hidden)[1:-1]} if hidden else set()  # with a line end within, as it is and as it is escaped
    if isinstance(said, str):
        for form in forms:
            said = said.replace(form, "***")
        return said
    return None if any(form in str(error) for error in led_by(said) for form in forms) else said


def led_by(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it, each once.

    >>> error = ValueError("later")
    >>> error.__cause__ = error.__context__ = KeyError("earlier")
    >>> print(*led_by(error))
    later 'earlier'
    """
    found: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in found:
            found[id(each)] = each
            waiting += [each.__context__, each.__cause__]
            yield each


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had: torch says so in a RuntimeError, in other words on every device.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    (True, True)
    """
    if isinstance(error, MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")  # cuBLAS, cuSOLVER
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


class EGGSError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(EGGSError, ValueError):
    """A value in [`EGGSConfig`], a pattern or a command-line option is not allowed."""


class ShapeError(EGGSError, ValueError):
    """A tensor or a layer does not have the shape the pattern needs."""


class CalibrationError(EGGSError, ValueError):
    """The calibration data is missing, empty, too short or does not fit the model."""


class NumericalError(EGGSError, ArithmeticError):
    """A weight, an activation or a solution is NaN or infinite."""


class ModelError(EGGSError, ValueError):
    """The model cannot be found, or is built in a way that cannot be pruned."""


class CheckpointError(EGGSError, RuntimeError):
    """A packed checkpoint is damaged, incomplete or of an unknown version."""


class OutputError(EGGSError, OSError):
    """An output folder cannot be written as asked."""


class OutOfMemoryError(EGGSError, MemoryError):
    """There is not enough memory, of the machine or of its accelerator, for what was asked."""


class DistributedError(EGGSError, RuntimeError):
    """A process of a distributed run is gone."""


class HubError(EGGSError, RuntimeError):
    """The Hub refused, or could not be reached."""
