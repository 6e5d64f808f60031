"""Draw the report of a packed model as one page, and as pictures for its card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument("-o", "--output", metavar="FILE", help="page to write (default: DIR/report.html)")
    parser.add_argument(
        "--figures",
        action="store_true",
        help="write the pictures to DIR/figures too, where the model card finds them (default: the page alone)",
    )
    parser.add_argument(
        "--spectra",
        action="store_true",
        help="measure the spectral gaps of the layers and show them; takes a while (default: leave them out)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw, write, and say where."""
    from ..errors import OutputError
    from ..files import add_to_list
    from ..report import report_page

    folder = Path(args.model)
    output = Path(args.output) if args.output else folder / "report.html"
    page = report_page(folder, folder / "figures" if args.figures else None, with_spectra=args.spectra)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error}); name another file with --output") from error
    add_to_list(folder, [path for path in (output, *folder.glob("figures/*")) if path.is_relative_to(folder)])
    print(json.dumps({"page": str(output)}) if args.json else f"wrote {output}")
    return 0
