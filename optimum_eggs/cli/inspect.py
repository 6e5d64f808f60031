"""Check a packed model and print the certificate of every layer, from its files alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .. import strict_json
from .printing import others_on_stderr, say

if TYPE_CHECKING:
    from ..masks.spectra import Spectra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `inspect`."""
    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument(
        "--spectra",
        action="store_true",
        help="measure the spectral gaps too, which takes a while (default: leave them out)",
    )


def run(args: argparse.Namespace) -> int:
    """Inspect and print; 2 if anything is wrong."""
    from ..inspection import inspect_checkpoint

    with others_on_stderr():
        found = inspect_checkpoint(args.model, with_spectra=args.spectra)
    if args.json:
        print(strict_json.dumps(found.to_dict()))
    elif found.layers:
        width = max(len(layer.name) for layer in found.layers)
        heads = f"{'out':>6} {'in':>6} {'n:m':>5} {'values':>9} {'min/mean degree':>16} {'starved':>8} {'floor':>9}"
        print(f"{'layer':<{width}} {heads}" + (f" {'gap':>7} {'weighted':>8}" if args.spectra else ""))
        for layer in found.layers:
            c = layer.certificate
            degrees = f"{c.input_degree_min}/{c.input_degree_mean:.0f}"
            size = f"{layer.out_features:>6} {layer.in_features:>6} {layer.pattern:>5} {layer.coding or 'floats':>9}"
            print(
                f"{layer.name:<{width}} {size} {degrees:>16} {c.starved_inputs:>8} {_floor(c.floors):>9}"
                f"{_gaps(layer.spectra)}"
            )
        packed = sum(layer.packed_bytes for layer in found.layers)
        dense = sum(layer.dense_bytes for layer in found.layers)
        sizes = f"{packed / 1e6:.1f} MB; dense {dense / 1e6:.1f} MB ({packed / dense:.4f})"
        print(f"{len(found.layers)} packed layers, {sizes}")
    for violation in found.violations:
        say(f"error: {violation.where}: {violation.rule}: {violation.detail}")
    if found.ok and not args.json:
        print("no violation")
    return 0 if found.ok else 2


def _gaps(spectra: Spectra | None) -> str:
    return "" if spectra is None else f" {1 - spectra.sigma2:>7.4f} {1 - spectra.sigma2_weighted:>8.4f}"


def _floor(floors: dict[int, int]) -> str:
    """The strongest floor: the smallest band in which every input keeps something, as `B/band`."""
    return next((f"{degree}/{band}" for band, degree in floors.items() if degree), "none")
