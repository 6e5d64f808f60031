"""Pictures of what `report.json` holds, drawn with matplotlib; what was not measured is not drawn.

Every function takes the report and returns a `Figure`, or None. Colours are near those of Okabe and Ito, which differ
for the colour-blind, and stand out on white and on black; markers differ too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2f8fd0", "#d9730d", "#1fa37a", "#c76ba2", "#8c7ae6", "#b59a00", "#6b8e9e", "#c0504d")
_MARKERS = "osD^vP*X"
_SIZE = (5.2, 3.2)  # inches; small, so that text is legible on a phone

Report = dict[str, Any]


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _by_kind(report: Report, value: Callable[[dict[str, Any]], float]) -> dict[str, tuple[list[int], list[float]]]:
    """For each kind of layer (the last part of its name): blocks, and the value of its layer in each."""
    kinds: dict[str, tuple[list[int], list[float]]] = {}
    for layer in report["layers"]:
        blocks, values = kinds.setdefault(layer["name"].rpartition(".")[2], ([], []))
        blocks.append(layer["block"])
        values.append(value(layer))
    return kinds


def _per_layer(
    report: Report,
    title: str,
    y: str,
    value: Callable[[dict[str, Any]], float],
    before: Callable[[dict[str, Any]], float] | None = None,
) -> tuple[Figure, Any]:
    """A line for each kind of layer; `before`, if every layer has it, is the same before the floor, dotted."""
    figure, axes = _axes(title, "block", y)
    kinds = _by_kind(report, value)
    for index, (kind, (blocks, values)) in enumerate(kinds.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(blocks, values, label=kind, markersize=3.5, linewidth=1, **style)
    if before is not None and all(layer.get("scores_alone") for layer in report["layers"]):
        for index, (blocks, values) in enumerate(_by_kind(report, before).values()):
            label = "before the floor" if index == len(kinds) - 1 else None
            axes.plot(blocks, values, ":", color=COLOURS[index % len(COLOURS)], linewidth=1, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", fontsize=8, ncols=4, framealpha=0)
    return figure, axes


def errors(report: Report) -> Figure | None:
    """Relative error of every layer on the calibration inputs, where there were any."""
    if any(layer["relative_error"] is None for layer in report["layers"]):
        return None
    figure, axes = _per_layer(
        report, "Error of each layer", "relative squared error", lambda layer: layer["relative_error"]
    )
    axes.set_yscale("log")
    return figure


def least_degrees(report: Report) -> Figure | None:
    """The share of outputs that the weakest input of every layer keeps."""
    figure, axes = _per_layer(
        report,
        "What the weakest input keeps",
        "share of its outputs, %",
        lambda layer: 100 * layer["certificate"]["input_degree_min"] / layer["out_features"],
        lambda layer: 100 * layer["scores_alone"]["input_degree_min"] / layer["out_features"],
    )
    axes.set_ylim(bottom=0)
    known = [layer for layer in report["layers"] if {"min_degree", "band"} <= layer.keys()]
    floors = {(layer["min_degree"], layer["band"]) for layer in known}
    if len(floors) == 1:
        degree, band = floors.pop()
        if degree:
            line = axes.axhline(100 * degree / band, color="#808080", linestyle="--", linewidth=1)
            axes.legend([line], [f"floor: {degree} of {band}"], fontsize=8, loc="upper right", framealpha=0)
    return figure


def spread_of_degrees(report: Report) -> Figure | None:
    """How unevenly the kept weights fall on the inputs."""
    figure, axes = _per_layer(
        report,
        "How unevenly inputs are kept",
        "deviation over mean of degrees",
        lambda layer: layer["certificate"]["input_degree_cv"],
        lambda layer: layer["scores_alone"]["input_degree_cv"],
    )
    axes.set_ylim(bottom=0)
    return figure


def spectra_of(layer: dict[str, Any]) -> dict[str, float] | None:
    """The spectra of a layer, if they are known; older reports have them in the certificate."""
    certificate = layer["certificate"]
    return layer.get("spectra") or (certificate if {"sigma2", "sigma2_weighted"} <= certificate.keys() else None)


def gaps(report: Report) -> Figure | None:
    """Spectral gap of the weighted bipartite graph of every layer, where it was asked for."""
    if not all(spectra_of(layer) for layer in report["layers"]):
        return None
    figure, axes = _per_layer(
        report,
        "Spectral gap, weighted by magnitude",
        "1 − σ₂",
        lambda layer: 1 - (spectra_of(layer) or {})["sigma2_weighted"],
    )
    axes.set_ylim(bottom=0)
    return figure


def tuning(report: Report) -> Figure | None:
    """Error of every block before and after it was tuned."""
    blocks = report.get("tuning")
    if not blocks:
        return None
    figure, axes = _axes("Blocks, before and after tuning", "block", "error on calibration windows")
    at = [block["block"] for block in blocks]
    axes.plot(at, [block["error_before"] for block in blocks], "o-", color=COLOURS[1], markersize=3.5, label="before")
    axes.plot(at, [block["error_after"] for block in blocks], "s-", color=COLOURS[0], markersize=3.5, label="after")
    axes.set_yscale("log")
    axes.legend(fontsize=8, framealpha=0)
    return figure


def perplexities(report: Report) -> Figure | None:
    """Perplexity of the model, and of the dense one, on every text it was judged on."""
    bars = []
    entries = report.get("evaluations") or []
    for entry in entries:
        if "perplexity" in entry["metrics"]:
            again = sum(other["dataset"] == entry["dataset"] for other in entries) > 1
            text = f"{entry['dataset']}, {entry['conditions']}" if again else entry["dataset"]
            if "perplexity" in entry.get("dense", {}):
                bars.append((f"{text}: dense", entry["dense"]["perplexity"], COLOURS[6]))
            bars.append((f"{text}: this model", entry["metrics"]["perplexity"], COLOURS[0]))
    recovered = report.get("recovery")
    if recovered and None not in (recovered["perplexity_before"], recovered["perplexity_after"]):
        bars.append(("held out: before recovery", recovered["perplexity_before"], COLOURS[1]))
        dropped = ", not kept" if recovered.get("kept") == "before" else ""
        bars.append((f"held out: after recovery{dropped}", recovered["perplexity_after"], COLOURS[0]))
    return _bars("Perplexity (less is better)", "perplexity", bars, ".2f")


def tasks(report: Report) -> Figure | None:
    """The score of the model, and of the dense one, in every task; of metrics that lie between 0 and 1."""
    bars, spread = [], []
    for entry in report.get("tasks") or []:
        for name, score in entry["metrics"].items():
            both = [("dense", COLOURS[6], entry.get("dense", {}).get(name)), ("this model", COLOURS[0], score)]
            if all(found is None or 0 <= found["value"] <= 1 for _, _, found in both):
                for who, colour, found in both:
                    if found is not None:
                        bars.append((f"{entry['task']}, {name}: {who}", found["value"], colour))
                        spread.append(found["stderr"] or 0.0)
    return _bars("Tasks (more is better)", "score, ± standard error", bars, ".3f", spread)


def seconds(report: Report) -> Figure | None:
    """What each stage of pruning took."""
    stages = (report.get("measurements") or {}).get("stages", {})
    bars = [(name, stage["seconds"], COLOURS[0]) for name, stage in stages.items()]
    return _bars("Time of each stage of pruning", "seconds", bars, ".1f")


def memory(report: Report) -> Figure | None:
    """Peak resident memory in each stage of pruning."""
    stages = (report.get("measurements") or {}).get("stages", {})
    bars = [(name, stage["peak_rss"] / 1e6, COLOURS[2]) for name, stage in stages.items()]
    return _bars("Peak memory in each stage of pruning", "resident memory, MB", bars, ",.0f")


def layer_speed(report: Report) -> Figure | None:
    """How many times as fast as dense each shape of layer is, by the number of tokens."""
    layers = (report.get("benchmark") or {}).get("layers")
    if not layers:
        return None
    figure, axes = _axes("Speed of each shape", "tokens in a call", "times dense")
    shapes = dict.fromkeys((row["out_features"], row["in_features"]) for row in layers)
    for index, (out, inner) in enumerate(shapes):
        rows = [row for row in layers if (row["out_features"], row["in_features"]) == (out, inner)]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(
            [row["tokens"] for row in rows],
            [row["ratio"] for row in rows],
            label=f"{out} × {inner}",
            markersize=4,
            **style,
        )
    axes.axhline(1, color="#808080", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize=8, ncols=3, framealpha=0)
    return figure


def _bars(
    title: str, x: str, bars: list[tuple[str, float, str]], style: str, spread: list[float] | None = None
) -> Figure | None:
    """Horizontal bars (label, length, colour), each with its value, and with a whisker of ± `spread`."""
    if not bars:
        return None
    figure, axes = _axes(title, x, "")
    if len(bars) > 8:
        figure.set_figheight(_SIZE[1] * len(bars) / 8)
    labels, values, colours = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colours, height=0.6, xerr=spread, ecolor="#808080", capsize=2)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.bar_label(drawn, [f"{value:{style}}" for value in values], padding=3, fontsize=8)
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    return figure


FIGURES: dict[str, Callable[[Report], Figure | None]] = {
    "perplexities": perplexities,
    "tasks": tasks,
    "errors": errors,
    "tuning": tuning,
    "least_degrees": least_degrees,
    "spread_of_degrees": spread_of_degrees,
    "gaps": gaps,
    "layer_speed": layer_speed,
    "seconds": seconds,
    "memory": memory,
}
"""Name -> the function that draws it, in the order of the page."""
