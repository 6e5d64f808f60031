"""Draw perplexity against minutes, as `frontier.py --json RESULT` measured. Usage: draw_frontier.py RESULT MODEL OUT.

Of the rows of one model that were trained on all of the text, a line for each preset and share of the teacher: what
pruning gives, and what training makes of it. OUT is an SVG file. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

INK = "#7d8590"  # legible on light and on dark pages
COLOURS = {"fast": "#0072b2", "alps": "#d55e00", "best": "#009e73"}
TICKS = (5, 10, 15, 30, 60)


def ratio(row: dict[str, Any]) -> float:
    """Perplexity of a row, of the dense model's."""
    return row["perplexity"] / row["perplexity_of_dense"]


def lines(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows by preset and share of the teacher, each line beginning with the pruned model."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["steps"] and row["training"]["windows"] is None:
            found[row["method"], row["training"]["kd_ratio"]].append(row)
    for (method, _), line in found.items():
        line += [row for row in rows if row["method"] == method and not row["steps"]]
        line.sort(key=lambda row: row["seconds"])
    return found


def draw(rows: list[dict[str, Any]], model: str) -> Any:
    """The figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set(xlabel="minutes from the dense model", ylabel="perplexity, of the dense model's")
    shown = lines(rows)
    for (method, share), line in shown.items():
        label = f"{method}, then trained by " + ("the teacher" if share == 1 else f"teacher ({share:.0%}) and text")
        minutes, style = [row["seconds"] / 60 for row in line], "o--" if share == 1 else "o-"
        axes.plot(minutes, list(map(ratio, line)), style, color=COLOURS.get(method, INK), label=label)
    axes.set_xticks(TICKS, list(map(str, TICKS)))
    ratios = [ratio(row) for line in shown.values() for row in line]
    ticks = [tick / 10 for tick in range(10, 60) if min(ratios) * 0.97 <= tick / 10 <= max(ratios) * 1.03]
    axes.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(linewidth=0.4)
    axes.legend(frameon=False)
    axes.set_title(f"{model} at 2:4, two cores: quality against time")
    return figure


def main() -> None:
    result, model, output = sys.argv[1:]
    rows = [row for row in json.loads(Path(result).read_text())["rows"] if row["model"] == model]
    ink: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(ink | {"grid.color": INK, "svg.fonttype": "none", "svg.hashsalt": model}):
        draw(rows, model).savefig(output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
