"""Draw the report of a packed model as one page, and as pictures for its card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryFile

from .printing import others_on_stderr


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
    from ..files import add_to_list, file_written, listed_files, write_durably
    from ..report import PICTURES, report_page

    folder = Path(args.model)
    output = Path(args.output) if args.output else folder / "report.html"
    taken = {(folder / name).resolve() for name in listed_files(folder) if not name.endswith(".html")}
    page_file, remedy = output.resolve(), "name another file with --output"
    if page_file in taken:
        raise OutputError(f"{output}: is a file of the model; {remedy}")
    with file_written(output, remedy), TemporaryFile(dir=page_file.parent):
        if page_file.exists() and not page_file.is_file():  # a folder, or a device, which would be replaced
            raise OSError("it is no file")
    with others_on_stderr():
        page = report_page(folder, folder / "figures" if args.figures else None, with_spectra=args.spectra)
    pictures = [folder / "figures" / f"{name}.png" for name in PICTURES] if args.figures else []
    with file_written(output, remedy):
        write_durably(page_file, page)
        add_to_list(folder, [output, *(path for path in pictures if path.is_file())])
    print(json.dumps({"page": str(output)}) if args.json else f"wrote {output}")
    return 0
