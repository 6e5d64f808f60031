"""Makes `optimum-cli` know the command `eggs`.

optimum looks for files like this one in the namespace package `optimum.commands.register`; the build puts it there.
It is read whenever `optimum-cli` starts, so it imports nothing heavy: the command's own parser is only built when the
command runs, and everything behind `eggs` is handed to it.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class EGGSCommand(BaseOptimumCLICommand):
    """`optimum-cli eggs`."""

    COMMAND = CommandInfo(name="eggs", help="Prune language models to N:M sparsity (optimum-eggs).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take everything behind `eggs` as it is."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.format_help = _format_help  # type: ignore[method-assign]

    def run(self) -> None:
        """Run the subcommand, and leave with its exit code."""
        from optimum_eggs.cli.main import main

        sys.exit(main(self.args.arguments, prog="optimum-cli eggs"))


def _format_help() -> str:
    from optimum_eggs.cli.main import build_parser

    return build_parser("optimum-cli eggs").format_help()


REGISTER_COMMANDS = [EGGSCommand]
