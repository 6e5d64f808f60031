"""A configuration from the command line: common keys by flags of their own, every choice by `--set`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, shorten

if TYPE_CHECKING:
    from ..config import EGGSConfig

_NOT_TO_BE_SET = {
    "tokenizer": "it is an object; the model's own is used",
    "pruned_modules": "the pruner writes it",
    "coded_modules": "the pruner writes it",
    "matrix_norms": "the pruner writes it",
    "format_version": "it follows from the values",
    "quant_method": "it is this package's",
}


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any choice of EGGSConfig, such as damping=0.02; the value is JSON or text (default: the preset's)",
    )


def make_config(flags: Mapping[str, Any], texts: Sequence[str]) -> EGGSConfig:
    """The configuration of flags, None for those that were not given, and of the texts given to `--set`.

    Raises:
        ConfigError: a text is no `key=value`, a key is unknown or not to be set, has two values, or a wrong one.
    """
    from ..config import EGGSConfig

    given = {key: value for key, value in flags.items() if value is not None}
    for text in texts:
        key, value = parse_setting(text)
        if key in _NOT_TO_BE_SET:
            raise ConfigError(f"--set {shorten(text)}: {key} is not to be set, {_NOT_TO_BE_SET[key]}; leave it out")
        if key in given and given[key] != value:
            raise ConfigError(f"{key} is given as {shorten(given[key])} and as {shorten(value)}; give it once")
        given[key] = value
    return EGGSConfig(**given)


def parse_setting(text: str) -> tuple[str, Any]:
    """`"damping=0.02"` to `("damping", 0.02)`; what is no JSON is text.

    Raises:
        ConfigError: there is no equals sign, or nothing before it.

    >>> parse_setting("solver=admm"), parse_setting("permutation=true"), parse_setting('targets=["q_proj"]')
    (('solver', 'admm'), ('permutation', True), ('targets', ['q_proj']))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {shorten(text)}: is not of the form KEY=VALUE; write for example --set damping=0.02")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
