"""The parser of all subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partialmethod

from ..errors import EGGSError
from . import benchmark, evaluate, export, inspect, pack, prune, push, recover, report
from .printing import printed_at_the_end

_SUBCOMMANDS = {
    "prune": prune,
    "pack": pack,
    "evaluate": evaluate,
    "inspect": inspect,
    "export": export,
    "benchmark": benchmark,
    "recover": recover,
    "report": report,
    "push": push,
}


def build_parser(prog: str = "optimum-eggs") -> argparse.ArgumentParser:
    """The parser of `eggs` and its subcommands."""
    parser = argparse.ArgumentParser(prog=prog, description="Prune language models to N:M sparsity.")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="{" + ",".join(_SUBCOMMANDS) + "}")
    for name, module in _SUBCOMMANDS.items():
        text = (module.__doc__ or "").strip()
        subparser = subparsers.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m optimum_eggs") -> int:
    """Run a subcommand. Returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    args = build_parser(prog).parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    _quiet_libraries()
    try:
        with printed_at_the_end():
            return args.run(args)
    except EGGSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"interrupted; {str(error) or 'nothing was written'}", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """Keep the libraries' progress bars and notes from a stderr that is no terminal."""
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
