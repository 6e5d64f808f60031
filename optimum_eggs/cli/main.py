"""The parser of all subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from functools import partial, partialmethod

from ..errors import EGGSError, OutOfMemoryError, first_line, is_out_of_memory
from ..folders import PUT_IN_PLACE, said_in_place
from ..interrupts import held_back
from ..logs import said_once
from ..memory import on_accelerator
from . import benchmark, evaluate, export, inspect, pack, prune, push, quantize, recover, report, startup
from .arguments import check_model
from .printing import printed_at_the_end, say, with_stderr

_SUBCOMMANDS = {  # docstrings would be gone in a Python without them (-OO)
    "prune": (prune, "Prune a model to N:M and save it packed."),
    "pack": (pack, "Pack a dense model that has the zeros of an N:M pattern already, without a change of any value."),
    "quantize": (quantize, "Store the values of a packed model as integers, under the masks that it has."),
    "evaluate": (
        evaluate,
        "Measure a saved model: perplexity, tasks, size on disk, parameters kept; against another model, if one is "
        "named.",
    ),
    "inspect": (inspect, "Check a packed model and print the certificate of every layer, from its files alone."),
    "export": (export, "Export a packed model as an ordinary dense checkpoint, zeros in place."),
    "benchmark": (
        benchmark,
        "Time a packed model on this machine: its layers against dense ones, and the model against its dense twin.",
    ),
    "recover": (recover, "Train a packed model back towards its dense teacher, under its mask; it stays packed."),
    "report": (report, "Draw the report of a packed model as one page, and as pictures for its card."),
    "push": (push, "Push a packed model to the Hub in one commit, with its card."),
}
_SAVE_MEMORY = ("batch_size", "seq_len", "num_samples", "memory_budget", "prompt", "batch")
"""Options that take less memory if they are smaller."""

_WRITE_ELSEWHERE = ("evaluate", "benchmark", "report", "push")
"""What these write is no folder of its own, so after an interrupt it is not known whether they have."""


def build_parser(prog: str = "optimum-eggs") -> argparse.ArgumentParser:
    """The parser of `eggs` and its subcommands."""
    also = "\n".join(f"  {name}  {text}" for name, text in startup.HELP.items()) if prog.startswith("python") else ""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Prune language models to N:M sparsity.",
        epilog=also and f"and, of Python's start:\n{also}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="{" + ",".join(_SUBCOMMANDS) + "}")
    for name, (module, text) in _SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        module.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")
        flags = {action.dest: action.option_strings[-1] for action in subparser._actions if action.option_strings}
        subparser.set_defaults(run=module.run, check=getattr(module, "check", check_model), flags=flags)
        subparser.set_defaults(refuse=partial(_refuse_unknown, subparser))
    return parser


@with_stderr()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m optimum_eggs") -> int:
    """Run a subcommand. Returns the exit code: 0, 1 without enough memory, 2 for bad input, 130 when interrupted."""
    args, before = argparse.Namespace(subcommand=None), len(PUT_IN_PLACE)
    try:
        args, unknown = build_parser(prog).parse_known_args(arguments)
        if unknown:
            args.refuse(unknown)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
        args.check(args)  # before anything heavy is imported
        _quiet_libraries()
        with said_once(), printed_at_the_end():
            return args.run(args)
    except OutOfMemoryError as error:
        say(_without_memory(error.__cause__ or error, args))
        return 1
    except EGGSError as error:
        say(f"error: {_with_flag(str(error), args)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say(_without_memory(error, args))
        return 1
    except KeyboardInterrupt as error:
        known = said_in_place(before) or [str(error)]
        if not any(known) and args.subcommand not in _WRITE_ELSEWHERE:
            known = ["nothing was written"]
        say("; ".join(["interrupted", *filter(None, known)]))
        return 130


def _refuse_unknown(subparser: argparse.ArgumentParser, unknown: list[str]) -> None:
    """Exit with what the subcommand was given and does not know, and what it does know that is spelt like it."""
    known = [option for action in subparser._actions for option in action.option_strings]
    near = [found[0] for each in unknown if (found := difflib.get_close_matches(each.partition("=")[0], known, 1))]
    meant = f"; did you mean {' and '.join(near)}?" if near else ""
    subparser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")


def _without_memory(error: BaseException, args: argparse.Namespace) -> str:
    """What to say when memory was out, with the options of the command that take less of it."""
    smaller = [f"--{name.replace('_', '-')}" for name in _SAVE_MEMORY if hasattr(args, name)]
    remedy = f"give a smaller {' or '.join(smaller)}" if smaller else "use a machine that has more"
    if hasattr(args, "device") and on_accelerator(error):
        remedy += ", or --device cpu"
    return f"error: there is not enough memory ({first_line(error)}); {remedy}"


def _with_flag(message: str, args: argparse.Namespace) -> str:
    """A message that begins with an argument's name in Python and its value, with the option that it was given by.

    >>> _with_flag("text='a.txt': there is no such file", argparse.Namespace(text="a.txt", flags={"text": "--text"}))
    "text='a.txt' (--text): there is no such file"
    """
    for key, flag in args.flags.items():
        value = getattr(args, key, None)
        for each in value if isinstance(value, list) else [value]:
            start = f"{key}={each!r}"
            rest = message.removeprefix(start)
            if rest != message and rest[:1] in (" ", ":", ";", ",") and f"({flag})" not in rest:
                return f"{start} ({flag}){rest}"
    return message


def _quiet_libraries() -> None:
    """Import the libraries, and keep their progress bars and notes from a stderr that is no terminal."""
    with held_back():  # torch's own C++ aborts on an interrupt within
        import torch  # noqa: F401
    from huggingface_hub.utils import logging as hub_logging
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    hub_logging.disable_propagation()  # it has a handler of its own
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
