"""One self-contained page of what `report.json` of a packed folder holds."""

from __future__ import annotations

import html
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.report import read_report, timed_on
from ..errors import CheckpointError, ConfigError, ModelError, OutputError
from ..files import REPORT_NAME
from ..folders import check_folder
from ..inspection import inspect_checkpoint
from .figures import FIGURES, spectra_of
from .tile import draw_tile, shown_tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = [*list(FIGURES)[:4], "tile", *list(FIGURES)[4:]]
"""Names of the pictures, in their order on the page."""

_INK = "#123457"  # stands for the page's text colour while matplotlib draws
_CAPTIONS = {
    "perplexities": "exp of the mean loss over the tokens predicted.",
    "tasks": "By lm-evaluation-harness.",
    "errors": "‖(W − Z)X‖²/‖WX‖² on the calibration inputs, before blocks were tuned.",
    "tuning": "Relative error of a block's output, on the calibration windows.",
    "tile": "One group of inputs and one band of outputs, with every weight kept. Without a floor, an input may lose "
    "all of its lines here; with one it keeps at least the number that the floor states.",
    "least_degrees": "An input that keeps nothing is starved: no output sees it. Before the floor: the mask of the "
    "largest importance scores alone.",
    "spread_of_degrees": "Zero is an even share for every input.",
    "gaps": "Of D_out^-½ |Z| D_in^-½. Measured, not promised: a floor on degrees does not imply a gap.",
    "layer_speed": "Dense time over packed time, on the machine named above; above 1 is faster.",
    "seconds": "Wall seconds, nested stages counted once.",
    "memory": "Resident memory of the whole process.",
}
_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#57606a;--page:#fff;--line:#d0d7de}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b3;--page:#0d1117;--line:#30363d}}
body{margin:0 auto;padding:1rem;max-width:70rem;font:16px/1.5 system-ui,sans-serif}
body{color:var(--ink);background:var(--page)}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0;padding:.5rem;border:1px solid var(--line);border-radius:6px}
figure svg{width:100%;height:auto;color:var(--ink)}figcaption{font-size:.85rem;color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}code{overflow-wrap:anywhere}
"""


def report_page(folder: str | Path, figures: str | Path | None = None, *, with_spectra: bool = False) -> str:
    """The page, as HTML.

    Args:
        folder: A packed model with its `report.json`.
        figures: Folder to write the pictures to as PNG, for the model card.
        with_spectra: Measure the spectral gaps of every layer, and show them, which takes a while.

    Raises:
        ModelError: the folder has no report of a pruned model.
        CheckpointError: its report or its weights cannot be read, or are damaged.
        ConfigError: matplotlib is missing.
        OutputError: the pictures cannot be written.
    """
    check_folder(folder)
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the report is drawn with matplotlib: pip install 'matplotlib>=3.9'") from error

    report = read_report(folder)
    if not report.get("layers"):
        raise ModelError(f"{folder}: has no report of a pruned model; prune one, or name its folder")
    if with_spectra:
        _measure_spectra(folder, report)
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    plain: dict[Any, Any] = {"text.parse_math": False}  # names are shown as they are, and may hold dollar signs
    ink: dict[Any, Any] = dict.fromkeys(coloured, _INK) | {"svg.fonttype": "none"} | plain
    drawn: dict[str, str] = {}
    for name in PICTURES:
        with matplotlib.rc_context(ink | {"svg.hashsalt": name}):
            figure = _draw(name, folder, report)
            if figure is not None:
                drawn[name] = _svg(figure)
        if figure is not None and figures is not None:
            with matplotlib.rc_context(plain):
                _png(_draw(name, folder, report), Path(figures) / f"{name}.png")
    pictures = "\n".join(
        f"<figure>{svg}<figcaption>{html.escape(_CAPTIONS[name])}</figcaption></figure>" for name, svg in drawn.items()
    )
    title = f"{Path(folder).absolute().name}: pruned to {report['summary']['pattern']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
{_summary(report)}
<main>
{pictures}
</main>
<h2>Every layer</h2>
<div class="wide">{_layers(report)}</div>
</body></html>
"""


def _measure_spectra(folder: str | Path, report: dict[str, Any]) -> None:
    """Put the spectra of every layer into the report.

    Raises:
        CheckpointError: the weights are damaged.
    """
    found = inspect_checkpoint(folder, with_spectra=True)
    found.raise_first("`inspect` lists all")
    measured = {layer.name: asdict(layer.spectra) for layer in found.layers if layer.spectra is not None}
    for layer in report["layers"]:
        if layer["name"] not in measured:
            raise CheckpointError(
                f"{Path(folder) / REPORT_NAME}: {layer['name']}: is no packed layer of the model; save it again"
            )
        layer["spectra"] = measured[layer["name"]]


def _draw(name: str, folder: str | Path, report: dict[str, Any]) -> Figure | None:
    return draw_tile(shown_tile(folder, report)) if name == "tile" else FIGURES[name](report)


def _svg(figure: Figure) -> str:
    """Inline SVG, transparent, in the page's text colour."""
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor").strip()


def _png(figure: Figure | None, path: Path) -> None:
    assert figure is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=160, facecolor="white")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error}); leave the pictures (--figures) out") from error


def _summary(report: dict[str, Any]) -> str:
    summary, took = report["summary"], report.get("measurements") or {}
    lines = [
        f"{summary['layers_pruned']} layers, {summary['parameters_pruned'] / 1e6:,.1f} M weights; "
        f"{summary['starved_inputs']} starved inputs."
    ]
    preset = report["config"].get("preset")
    calibration = report["calibration"]
    seconds = took.get("seconds", 0) + took.get("seconds_of_earlier_runs", 0)
    if calibration:
        overlapping = "overlapping " if calibration.get("overlapping") else ""
        lines.append(
            (f"Preset <code>{html.escape(preset)}</code>, c" if preset else "C")
            + f"alibrated on {calibration['windows']} {overlapping}windows of {calibration['seq_len']} tokens"
            + (f", {calibration['generated']} of them by the dense model" if calibration.get("generated") else "")
            + (f", in {seconds:,.0f} s." if seconds else ".")
        )
    else:
        lines.append("Packed as they were: how their zeros came about is not known.")
    lacking = [layer["scores_alone"] for layer in report["layers"] if layer.get("scores_alone")]
    if lacking:
        short, pairs = (sum(found[key] for found in lacking) for key in ("short", "pairs"))
        lines.append(
            f"By the scores alone, {short:,} of {pairs:,} pairs of an input and a band of outputs would fall short of "
            f"the floor, and {sum(found['starved_inputs'] for found in lacking):,} inputs would be starved."
        )
    recovered = report.get("recovery")
    if recovered:
        settings, took = recovered["settings"], recovered.get("measurements", {})
        lines.append(
            f"Recovered under the mask: {recovered['steps']} steps of <code>{html.escape(settings['method'])}</code>"
            + (f", in {took['seconds']:,.0f} s." if "seconds" in took else ".")
        )
        if recovered.get("kept") == "before":
            lines.append("That was worse on the windows held out, so the values are those of before.")
    speed = report.get("benchmark")
    if speed:
        ours, *dense = speed["models"]
        compiled = " compiled" if ours.get("compiled") else ""
        against = f", dense {dense[0]['decode_speed']:.1f}" if dense else ""
        lines.append(
            f"Decodes {ours['decode_speed']:.1f} tokens/s{compiled}{against}, "
            f"on {html.escape(timed_on(speed['machine']))}."
        )
    return "".join(f"<p>{line}</p>" for line in lines)


def _layers(report: dict[str, Any]) -> str:
    heads = ["layer", "out × in", "n:m", "error", "least degree", "mean", "deviation/mean"]
    with_spectra = all(spectra_of(layer) for layer in report["layers"])
    if with_spectra:
        heads += ["gap", "weighted gap"]
    rows = []
    for layer in report["layers"]:
        found = layer["certificate"]
        cells = [
            html.escape(layer["name"]),
            f"{layer['out_features']} × {layer['in_features']}",
            html.escape(layer["pattern"]),
            "" if layer["relative_error"] is None else f"{layer['relative_error']:.4f}",
            f"{found['input_degree_min']}",
            f"{found['input_degree_mean']:.0f}",
            f"{found['input_degree_cv']:.3f}",
        ]
        if with_spectra:
            spectra = spectra_of(layer) or {}
            cells += [f"{1 - spectra[key]:.3f}" for key in ("sigma2", "sigma2_weighted")]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
