"""Where kept weights sit: the bipartite graph of one group of inputs and one band of outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import REPORT_NAME
from ..packing import unpack_mask
from ..packing.checkpoint import read_headers, stored_names, weight_files
from ..packing.layout import meta_width
from ..pattern import NMPattern
from .figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAND = 16


@dataclass(frozen=True)
class Tile:
    """A group of m inputs and a band of outputs of the layer `name`, from `row` and `column` on.

    `mask` (rows, m) is what the model keeps; `scores_alone` (rows, m) what the largest scores would have kept, where
    the report knows it.
    """

    name: str
    row: int
    column: int
    mask: Tensor
    scores_alone: Tensor | None = None


def shown_tile(folder: str | Path, report: dict[str, Any]) -> Tile:
    """The tile that shows best what the floor does: the worst of the layer whose scores alone lack most of it.

    Without a floor: the tile with the input that keeps least of a band, in the layer whose weakest input keeps the
    smallest share.

    Raises:
        CheckpointError: the folder holds no whole safetensors checkpoint, or another one than the report is of.
    """
    layers = report["layers"]
    known = [layer for layer in layers if layer.get("scores_alone")]
    if known:
        layer = max(known, key=lambda layer: layer["scores_alone"]["short"] / layer["scores_alone"]["pairs"])
        before = layer["scores_alone"]
        alone = torch.tensor([[kept == "1" for kept in line] for line in before["tile"]])
        row, column = before["row"], before["column"]
        mask = _mask(folder, layer)[row : row + len(alone), column : column + alone.shape[1]]
        if mask.shape != alone.shape:
            raise _differs(folder, layer, f"the tile of its scores_alone, from {row}, {column} on, lies beyond it")
        return Tile(layer["name"], row, column, mask, alone)
    layer = min(layers, key=lambda layer: layer["certificate"]["input_degree_min"] / layer["out_features"])
    mask = _mask(folder, layer)
    height, m = min(_BAND, len(mask)), NMPattern.parse(layer["pattern"]).m
    banded = mask[: len(mask) // height * height].unflatten(0, (-1, height)).sum(1)  # (bands, in)
    weakest = int(banded.flatten().argmin())
    row, column = weakest // mask.shape[1] * height, weakest % mask.shape[1] // m * m
    return Tile(layer["name"], row, column, mask[row : row + height, column : column + m])


def _mask(folder: str | Path, layer: dict[str, Any]) -> Tensor:
    entries = read_headers(weight_files(folder))
    key = f"{stored_names(entries, [layer['name']])[layer['name']]}.weight_meta"
    if key not in entries or entries[key].shape != (layer["out_features"], meta_width(layer["in_features"])):
        size = f"{layer['out_features']} x {layer['in_features']}"
        raise _differs(folder, layer, f"the weights hold no packed layer of that name and of {size}")
    with safe_open(entries[key].file, framework="pt") as file:
        return unpack_mask(file.get_tensor(key), layer["in_features"])


def _differs(folder: str | Path, layer: dict[str, Any], how: str) -> CheckpointError:
    return CheckpointError(f"{Path(folder) / REPORT_NAME}: {layer['name']}: {how}; save the model again")


def draw_tile(tile: Tile) -> Figure:
    """Inputs on the left, outputs on the right, a line for every weight kept; the weakest input's lines stand out."""
    from matplotlib.figure import Figure

    graphs = {"": tile.mask}
    if tile.scores_alone is not None:
        graphs = {"by the scores alone": tile.scores_alone, "under the floor": tile.mask}
    weakest = int(next(iter(graphs.values())).sum(0).argmin())
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    for axes, (title, mask) in zip(figure.subplots(1, len(graphs), squeeze=False)[0], graphs.items(), strict=True):
        _draw_graph(axes, mask, tile, weakest)
        axes.set_title(title, fontsize=9)
    figure.suptitle(
        f"One tile of {tile.name}" if tile.scores_alone is not None else f"The weakest input of\n{tile.name}",
        fontsize=10,
    )
    return figure


def _draw_graph(axes: Any, mask: Tensor, tile: Tile, weakest: int) -> None:
    rows, m = mask.shape
    degrees = mask.sum(0)
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
        label = f"input {tile.column + i}\nkeeps {int(degrees[i])}"
        axes.text(-0.08, place, label, ha="right", va="center", fontsize=8)
    label = f"outputs\n{tile.row} to\n{tile.row + rows - 1}"
    axes.text(1.08, (rows - 1) / 2, label, ha="left", va="center", fontsize=8)
    axes.set_xlim(-0.75, 1.6)
    axes.invert_yaxis()
    axes.axis("off")
