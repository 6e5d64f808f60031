"""What several commands have in common: kinds of numbers, options, and the help that leaves rare options out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import validation as check
from ..access import closed, kind, no_utf8
from ..errors import ConfigError
from ..folders import check_folder
from ..names import hub_id
from .printing import say

if TYPE_CHECKING:
    import torch

_MOST = 2**31 - 1  # what counts something is handed to code that takes no more


def parse_shares(given: Sequence[str], argument: str) -> dict[str, float]:
    """Texts and the shares behind their names, 1 where none is.

    Raises:
        ConfigError: a text is named twice.
        CalibrationError: a share is not a positive number.

    >>> parse_shares(["a.txt=3", "c4"], "train")
    {'a.txt': 3.0, 'c4': 1.0}
    """
    from ..calibration.documents import refuse_twice
    from ..calibration.windows import check_share

    found: list[tuple[str, float]] = []
    for item in given:
        name, share = item, 1.0
        head, equals, tail = item.rpartition("=")
        if equals and not Path(item).exists():
            with suppress(ValueError):  # an equals sign within a name
                name, share = head, float(tail)
        check_share(name, share, argument)
        found.append((name, share))
    refuse_twice([name for name, _ in found], argument)
    return dict(found)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option that takes an integer of this range."""

    def parse(text: str) -> int:
        try:
            return check.integer("", int(text), least, _MOST if most is None else most)
        except ValueError:  # ConfigError is one
            huge = text.isdecimal() and int(text) > _MOST
            allowed = f"from {least} to {most or _MOST}" if most or huge else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer {allowed}") from None

    return parse


def number(
    above: float | None = None,
    least: float | None = None,
    most: float = float("inf"),
    below: float = float("inf"),
) -> Callable[[str], float]:
    """The `type` of an option for a finite number: `above` one or of `least` one, and of `most` or `below` one."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        fits = value > above if above is not None else least is None or value >= least
        if not fits or value >= below or value > most:
            allowed = f"above {above:g}" if above is not None else f"of at least {least:g}"
            allowed += f" and at most {most:g}" if most < float("inf") else ""
            allowed += f" and below {below:g}" if below < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text!r} must be a finite number {allowed}")
        return value

    return parse


def size(least: int) -> Callable[[str], int]:
    """The `type` of an option that takes a number of bytes."""

    def parse(text: str) -> int:
        try:
            return check.size("", text, least)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from None

    return parse


def check_source(name: str, option: str = "", bare: bool = True) -> None:
    """Raise if a model is no folder, no GGUF file and no id on the Hub; `bare`: whether an id may be without an owner.

    Raises:
        ModelError: it is none; the `option` that it was given by is in the message.
    """
    path = Path(name)
    on_the_hub = hub_id(name) is not None and (bare or "/" in name)
    is_gguf = path.suffix == ".gguf" and kind(path) == "file" and not (closed(path) or no_utf8(path))
    if not on_the_hub and not is_gguf:
        check_folder(name, option)


def check_model(args: argparse.Namespace) -> None:
    """Raise if DIR is no folder."""
    check_folder(args.model)


def check_both(args: argparse.Namespace) -> None:
    """Raise if DIR, or what is given by `--against`, is no folder."""
    check_folder(args.model)
    if args.against is not None:
        check_folder(args.against, "--against")


def add_trust(add: Callable[..., Any], whose: str) -> None:
    """Add `--trust-remote-code`; `whose` code it is."""
    add("--trust-remote-code", action="store_true", help=f"run code that comes with {whose} (default: refuse it)")


def add_device(add: Callable[..., Any]) -> None:
    """Add `--device`."""
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="device to work on, such as cuda:1 or cpu (default: auto, an accelerator if there is one)",
    )


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device that `--device` names; which it is, where it is an accelerator that was not named, is said.

    Raises:
        ConfigError: there is no such device.
    """
    from ..devices import choose_device, described

    device = choose_device(args.device)
    if args.device == "auto" and device.type != "cpu":
        say(f"on {described(device)}")
    return device


def add_shard_size(add: Callable[..., Any]) -> None:
    """Add `--max-shard-size`."""
    add("--max-shard-size", type=size(1), default="50GB", metavar="SIZE", help="largest weight file (default: 50GB)")


def rare(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """An `add_argument` for options that `--help` leaves out; `--help-all`, which is added too, shows them."""
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option and exit")

    def add(*names: str, help: str, **options: Any) -> None:
        action: Any = parser.add_argument(*names, help=argparse.SUPPRESS, **options)
        action.full_help = help

    return add


class _HelpAll(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()
