"""Draw perplexity against minutes, as `frontier.py --json RESULT` measured. Usage: draw_frontier.py RESULT MODEL OUT.

Of the rows of one model that were trained on all of the text, a line for each preset and share of the teacher: what
pruning gives, and what training makes of it. OUT is an SVG file. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

INK = "#7d8590"  # legible on light and on dark pages
COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")  # of Okabe and Ito, told apart by all
TICKS = (5, 10, 15, 30, 60)


def ratio(row: dict[str, Any], prefix: str) -> float:
    """Perplexity of a row, of the dense model's; `prefix` says on which text."""
    return row[f"{prefix}perplexity"] / row[f"{prefix}perplexity_of_dense"]


def lines(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows by preset and share of the teacher, each line beginning with the pruned model."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["steps"] and not row["training"]["same_windows"]:
            found[row["method"], row["training"]["kd_ratio"]].append(row)
    for (method, _), line in found.items():
        line += [row for row in rows if row["method"] == method and not row["steps"]]
        line.sort(key=lambda row: row["seconds"])
    return dict(sorted(found.items()))


def draw(rows: list[dict[str, Any]], model: str) -> Any:
    """The figure, with a panel for each text that all rows were judged on."""
    from matplotlib.figure import Figure

    shown = lines(rows)
    drawn = [row for line in shown.values() for row in line]
    panels = [prefix for prefix in ("", "other_") if all(f"{prefix}perplexity" in row for row in drawn)]
    colours = dict(zip(dict.fromkeys(method for method, _ in shown), cycle(COLOURS), strict=False))
    figure = Figure(figsize=(3.2 + 4 * len(panels), 4.6), layout="constrained")
    for axes, prefix in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="minutes from the dense model")
        axes.set_title(
            f"on {drawn[0]['other_text']}" if prefix else "on text of the kind trained on", fontsize="medium"
        )
        for (method, share), line in shown.items():
            label = f"{method}, trained by " + ("the teacher" if share == 1 else f"teacher ({share:.0%}) and text")
            minutes, style = [row["seconds"] / 60 for row in line], "o--" if share == 1 else "o-"
            ratios = [ratio(row, prefix) for row in line]
            axes.plot(minutes, ratios, style, color=colours[method], label=label)
        axes.set_xticks(TICKS, list(map(str, TICKS)))
        ratios = [ratio(row, prefix) for row in drawn]
        ticks = [tick / 10 for tick in range(10, 60) if min(ratios) * 0.97 <= tick / 10 <= max(ratios) * 1.03]
        ticks = ticks[:: 1 + len(ticks) // 15]  # as many as are legible
        axes.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(linewidth=0.4)
    figure.axes[0].set_ylabel("perplexity, of the dense model's")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    patterns, threads = ({row[key] for row in drawn} for key in ("pattern", "threads"))
    figure.suptitle(f"{model} at {', '.join(sorted(patterns))}, {', '.join(map(str, sorted(threads)))} threads")
    return figure


def main() -> None:
    result, model, output = sys.argv[1:]
    rows = [row for row in json.loads(Path(result).read_text())["rows"] if row["model"] == model]
    if not lines(rows):
        sys.exit(f"{result} has no row of {model} that was trained on all of the text; frontier.py --steps adds one")
    ink: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(ink | {"grid.color": INK, "svg.fonttype": "none", "svg.hashsalt": model}):
        draw(rows, model).savefig(output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
