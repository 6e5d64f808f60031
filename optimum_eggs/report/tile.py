"""Where kept weights sit: the bipartite graph of one group of inputs and one band of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from ..packing import unpack_mask
from ..packing.checkpoint import read_headers, stored_names, weight_files
from ..pattern import NMPattern
from .figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAND = 16


def weakest_tile(folder: str | Path, report: dict[str, Any]) -> tuple[str, int, int, Tensor]:
    """The tile with the input that keeps least of a band, in the layer whose weakest input keeps the smallest share.

    Returns:
        The layer's name, its first row and first column, and the mask (rows, m) of the tile.

    Raises:
        CheckpointError: the folder holds no whole safetensors checkpoint.
    """
    layer = min(report["layers"], key=lambda layer: layer["certificate"]["input_degree_min"] / layer["out_features"])
    entries = read_headers(weight_files(folder))
    stored = stored_names(entries, [layer["name"]])[layer["name"]]
    with safe_open(entries[f"{stored}.weight_meta"].file, framework="pt") as file:
        mask = unpack_mask(file.get_tensor(f"{stored}.weight_meta"), layer["in_features"])
    height, m = min(_BAND, len(mask)), NMPattern.parse(layer["pattern"]).m
    banded = mask[: len(mask) // height * height].unflatten(0, (-1, height)).sum(1)  # (bands, in)
    weakest = int(banded.flatten().argmin())
    row, column = weakest // mask.shape[1] * height, weakest % mask.shape[1] // m * m
    return layer["name"], row, column, mask[row : row + height, column : column + m]


def draw_tile(name: str, row: int, column: int, mask: Tensor) -> Figure:
    """Inputs on the left, outputs on the right, a line for every weight kept; the weakest input's lines stand out."""
    from matplotlib.figure import Figure

    rows, m = mask.shape
    degrees = mask.sum(0)
    weakest = int(degrees.argmin())
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    places = [(i + 0.5) * rows / m - 0.5 for i in range(m)]
    for output, inner in mask.nonzero().tolist():
        own = inner == weakest
        style: dict[str, Any] = {
            "color": COLOURS[1] if own else "#808080",
            "linewidth": 2.0 if own else 0.7,
            "zorder": 2 if own else 1,
        }
        axes.plot([0, 1], [places[inner], output], **style)
    axes.scatter([0] * m, places, s=60, color=[COLOURS[1] if i == weakest else COLOURS[0] for i in range(m)], zorder=3)
    axes.scatter([1] * rows, range(rows), s=24, color=COLOURS[2], zorder=3)
    for i, place in enumerate(places):
        axes.text(-0.05, place, f"input {column + i}\nkeeps {int(degrees[i])}", ha="right", va="center", fontsize=8)
    axes.text(1.05, (rows - 1) / 2, f"outputs\n{row} to\n{row + rows - 1}", ha="left", va="center", fontsize=8)
    axes.set_xlim(-0.45, 1.3)
    axes.invert_yaxis()
    axes.axis("off")
    axes.set_title(f"The weakest input of\n{name}", fontsize=10)
    return figure
