"""The model card: made from the report of a packed folder, so that it states what was measured and nothing else."""

from __future__ import annotations

import pprint
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from ..access import no_file
from ..calibration.documents import DatasetName, dataset_id
from ..config import EGGSConfig
from ..engine.report import read_report, text_uses, timed_on
from ..errors import ModelError, first_line, more
from ..files import REPORT_NAME
from ..names import hub_id
from ..packing.checkpoint import read_config

CARD_NAME = "README.md"
BEGIN, END = "<!-- optimum-eggs: begin -->", "<!-- optimum-eggs: end -->"
_COMPARED = {
    "kl_divergence": "KL divergence from the dense model, nats a token",
    "top1_agreement": "tokens with the dense model's most likely next one",
}
_FIGURES = ("perplexities", "tasks", "errors", "tile", "least_degrees")  # those of `optimum-cli eggs report --figures`
_TEMPLATE = Path(__file__).with_name("card_template.md")


def model_card(
    folder: str | Path,
    repository: str | None = None,
    base_card: ModelCard | None = None,
    tags: Sequence[str] = (),
    existing: str | None = None,
) -> ModelCard:
    """The card of the packed model in `folder`.

    A README.md that is there keeps its metadata and its text; what this package writes goes between two markers.

    Args:
        folder: A packed model with its `report.json`.
        repository: Id on the Hub, for the title and the code; default: the folder's name.
        base_card: Card of the dense model, for its licence and languages.
        tags: Further tags.
        existing: Text of a card to keep, in place of the README.md that is there.

    Raises:
        ModelError: the folder has no report, or the README.md that is there is no UTF-8 or has metadata that cannot be
            read.
        CheckpointError: the folder is no packed model, or its report is damaged.
    """
    path = Path(folder)
    report = read_report(path)
    if "layers" not in report:
        raise ModelError(
            f"{path}: has no {REPORT_NAME} of a pruned model; name the folder of a packed model that EGGSPruner saved"
        )
    config = read_config(path)
    repository = repository or path.absolute().name
    data = _metadata(report, repository, base_card)
    data.tags = [*(data.tags or []), *tags]
    card = ModelCard.from_template(data, template_path=str(_TEMPLATE), **_texts(report, config, repository, path))
    own = path / CARD_NAME
    if existing is None and own.is_file():
        existing = read_card(own)
    return card if existing is None else _merged(parsed(existing), card)


def write_card(
    folder: str | Path,
    repository: str | None = None,
    base_card: ModelCard | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write the card of `folder` to its README.md, as [`model_card`]."""
    card = model_card(folder, repository, base_card, tags)
    target = Path(folder) / CARD_NAME
    target.write_text(card_text(card), encoding="utf-8")
    return target


def card_text(card: ModelCard) -> str:
    """A card as its file holds it: with an end to its last line, so that what is appended begins a line of its own."""
    return f"{str(card).rstrip()}\n"


def _metadata(report: dict[str, Any], repository: str, base_card: ModelCard | None) -> ModelCardData:
    pattern = report["summary"]["pattern"]
    base = hub_id((report.get("base_model") or {}).get("id"))
    inherited = base_card.data.to_dict() if base_card is not None else {}
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if base else {}
    source = report["config"].get("calibration")
    names = list(source) if isinstance(source, dict) else [source] if isinstance(source, str) else []
    data_sets = [found for name in names if (found := dataset_id(name))]
    return ModelCardData(
        base_model=base,
        datasets=data_sets or None,
        eval_results=_results(report) or None,
        model_name=repository.split("/")[-1],
        language=inherited.get("language"),
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["eggs", "optimum-eggs", "sparse", "N:M", pattern],
        **relation,
    )


def _results(report: dict[str, Any]) -> list[EvalResult]:
    found = []
    for entry in report.get("evaluations") or []:
        named = DatasetName.parse(entry["dataset"])
        # the Hub allows no other characters here
        kind = re.sub(r"[^\w./-]+", "-", dataset_id(entry["dataset"]) or named.path)
        for metric, value in entry["metrics"].items():
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=kind,
                    dataset_name=entry["dataset"],
                    dataset_config=named.config_name,
                    dataset_revision=named.revision,
                    dataset_split=entry.get("split"),
                    metric_type=metric,
                    metric_value=round(value, 4),
                )
            )
    for entry in report.get("tasks") or []:
        for metric, score in entry["metrics"].items():
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=entry["task"],
                    dataset_name=entry["task"],
                    metric_type=metric,
                    metric_value=round(score["value"], 4),
                )
            )
    return found


def _texts(report: dict[str, Any], config: dict[str, Any], repository: str, folder: Path) -> dict[str, str]:
    summary = report["summary"]
    as_it_was = not report["calibration"]
    base = hub_id((report.get("base_model") or {}).get("id"))
    recovered = report.get("recovery")
    what = f"[{base}](https://huggingface.co/{base})" if base else "a dense model"
    dense = report.get("left_dense") or []
    method = [_packed_as_it_was(summary) if as_it_was else _pruned(report)]
    alone = summary.get("layers_by_weights_alone")
    if alone:
        least = report["config"].get("min_expert_tokens")
        method.append(
            f"{alone} of the layers are of experts that {'too few' if least is None else f'fewer than {least}'} "
            "calibration tokens reached; they were pruned by their weights alone."
        )
    if dense:
        method.append(f"Left dense: {', '.join('`' + layer['name'] + '`' for layer in dense[:6])}{more(dense, 6)}.")
    method += _rounded(config)
    if recovered:
        settings = recovered["settings"]
        done = (
            f"{recovered['steps']} steps of `{settings['method']}` on {recovered['windows']} windows of "
            f"{settings['seq_len']} tokens"
            + (", towards the dense model's probabilities" if settings.get("teacher") else "")
            + (" and the text's own next tokens" if settings.get("kd_ratio", 1) < 1 else "")
        )
        method.append(
            f"Training it afterwards under the mask ({done}) raised the perplexity on the windows held out, so the "
            "values are those of before."
            if recovered.get("kept") == "before"
            else f"Recovered afterwards under the mask: {done}."
        )
    done = "stored packed, with the zeros that it had:" if as_it_was else "pruned and stored packed:"
    return {
        "begin": BEGIN,
        "end": END,
        "title": repository.split("/")[-1],
        "repository": repository,
        "summary": f"This is {what}, {done} {summary['pattern']} sparsity, by optimum-eggs.",
        "method": "\n\n".join(method),
        "measured": _measured(report),
        "figures": "\n\n".join(
            f"![{name.replace('_', ' ')}](figures/{name}.png)"
            for name in _FIGURES
            if (folder / "figures" / f"{name}.png").is_file()
        ),
        "certificate": _certificate(report),
        "again": _again(report, config, base, as_it_was),
    }


def _rounded(config: dict[str, Any]) -> list[str]:
    """What of the model is stored in integers, as a paragraph; none if nothing is."""
    parts = []
    if config.get("values"):
        how = {"nearest": "each rounded to the nearest", "gptq": "rounding errors passed on (GPTQ)"}
        tuned = config.get("rounding_tuning")
        then = f", {tuned} steps of tuning with the rounding in the loop" if tuned else ""
        parts.append(
            f"the values kept as `{config['values']}` with a scale for every {config['value_group']} inputs "
            f"({how[config['rounding']]}{then})"
        )
    if config.get("head"):
        parts.append(f"embeddings and output head as `{config['head']}`")
    if config.get("ignored"):
        parts.append(f"linear layers that were left dense on request as `{config['ignored']}`")
    return [f"Stored in integers: {'; '.join(parts)}."] if parts else []


def _pruned(report: dict[str, Any]) -> str:
    summary, source, preset = report["summary"], report["config"].get("calibration"), report["config"].get("preset")
    return (
        f"{summary['layers_pruned']} linear layers, {summary['parameters_pruned'] / 1e6:,.1f} M weights, were pruned "
        f"{'with the preset `' + preset + '`' if preset else 'with the configuration below'}, calibrated on "
        + _windows(report)
        + (f" of `{source}`" if isinstance(source, str) and (hub_id(source) or dataset_id(source)) else "")
        + f"{_written(report)}."
    )


def _packed_as_it_was(summary: dict[str, Any]) -> str:
    filled = summary.get("zeros_kept")
    return (
        f"{summary['layers_pruned']} linear layers, {summary['parameters_pruned'] / 1e6:,.1f} M weights, had the zeros "
        "already and were packed without a change of any value. What put the zeros there is not known here."
        + (f" {filled:,} of the positions that count as kept hold a zero." if filled else "")
    )


def _windows(report: dict[str, Any]) -> str:
    found = report["calibration"]
    of_text = found["windows"] - found.get("generated", 0)
    return f"{of_text} {'overlapping ' * bool(found.get('overlapping'))}windows of {found['seq_len']} tokens"


def _written(report: dict[str, Any]) -> str:
    count = report["calibration"].get("generated")
    return f", and {count} that the dense model wrote behind beginnings taken from them" if count else ""


def _again(report: dict[str, Any], config: dict[str, Any], base: str | None, as_it_was: bool) -> str:
    """The code that makes the model again."""
    source = repr(base) if base else '"path/or/id"'
    if as_it_was:
        patterns = set(config["pruned_modules"].values())  # one that all layers have may have been asked for
        named = {"pattern": patterns.pop() if len(patterns) == 1 else None, "targets": config["targets"]}
        given = {key: value for key, value in named.items() if value is not None} | {"ignore": config["ignore"]}
        names = ", ".join(f"{key}={value!r}" for key, value in given.items())
        lines = [
            "from optimum_eggs import EGGSPruner",
            "",
            f"pruner = EGGSPruner.from_pretrained({source})",
            f"pruner.pack({names})",
        ]
    else:
        shown = EGGSConfig.from_dict(config).to_dict()  # without the keys of earlier releases
        for key in ("pruned_modules", "coded_modules", "matrix_norms", "format_version"):
            del shown[key]
        rounded = report.get("quantization")
        if rounded:  # by a command of its own
            shown |= dict.fromkeys(("values", "value_group", "rounding", "head", "ignored")) | {"rounding_tuning": 0}
        digest = f"{_windows(report)}{_written(report)}; SHA-256 of the token ids {report['calibration']['sha256']}"
        lines = [
            "from optimum_eggs import EGGSConfig, EGGSPruner",
            "",
            f"config = EGGSConfig.from_dict({pprint.pformat(shown, compact=True, width=100)})",
            f"pruner = EGGSPruner.from_pretrained({source})",
            f"pruner.prune(config, calibration=...)  # {digest}",
        ]
    lines.append('pruner.save_pretrained("out")')
    return "\n".join([*lines, *_afterwards(report)])


def _afterwards(report: dict[str, Any]) -> list[str]:
    """The commands that came after pruning, as comments, in their order."""
    recovered, rounded = report.get("recovery"), report.get("quantization")
    commands = []
    if recovered and recovered.get("kept") != "before":
        flags = f"--method {recovered['settings']['method']} --steps {recovered['steps']} --train ..."
        flags += " --teacher ..." if recovered["settings"].get("teacher") else ""
        commands.append(("recover", "recovered", flags))
    if rounded:
        keys = ("values", "value_group", "head", "ignored", "rounding", "rounding_tuning")
        given = {key: rounded.get(key) for key in keys}
        flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items() if value is not None)
        flags += " --calibration ..." if rounded.get("calibration") else ""
        commands.append(("quantize", "rounded", flags))
    if recovered and recovered["perplexity_after"] is not None:  # rounding leaves out what was measured before it
        commands.reverse()
    folders = ["out", *(output for _, output, _ in commands)]
    return [
        f"# and then: optimum-cli eggs {name} {source} {output} {flags}"
        for source, (name, output, flags) in zip(folders, commands, strict=False)
    ]


def _measured(report: dict[str, Any]) -> str:
    lines = ["| what | on | value | dense |", "|---|---|---:|---:|"]
    for entry in report.get("evaluations") or []:
        text = {"name": entry["dataset"], "split": entry.get("split"), "sha256": entry.get("text_sha256")}
        uses = text_uses(report, text)
        also = f"; the model was also {' and '.join(uses)} on it" if uses else ""
        where = f"{entry['dataset']}, {entry['conditions']}{also}"
        for metric, value in entry["metrics"].items():
            dense = entry.get("dense", {}).get(metric)
            lines.append(f"| {metric} | {where} | {value:.2f} | {'' if dense is None else f'{dense:.2f}'} |")
        for key, label in _COMPARED.items():
            found = entry.get("comparison", {}).get(key)
            if found:
                ends = found["low"], found["high"]
                span = "" if None in ends else f" ({ends[0]:.3f} to {ends[1]:.3f})"
                lines.append(f"| {label} | {where} | {found['value']:.3f}{span} | |")
    for entry in report.get("tasks") or []:
        where = f"{entry['task']} (lm-evaluation-harness, version {entry['version']}), {entry['conditions']}"
        for metric, score in entry["metrics"].items():
            theirs = entry.get("dense", {}).get(metric)
            lines.append(f"| {metric} | {where} | {_score(score)} | {'' if theirs is None else _score(theirs)} |")
    recovered = report.get("recovery")
    judged = recovered and None not in (recovered["perplexity_before"], recovered["perplexity_after"])
    if recovered and judged and recovered.get("kept") != "before":
        change = f"{recovered['perplexity_after']:.2f} (before: {recovered['perplexity_before']:.2f})"
        lines.append(f"| perplexity after recovery | {recovered['windows_held_out']} windows held out | {change} | |")
    speed = report.get("benchmark")
    if speed:
        where = timed_on(speed["machine"])
        ours, *rest = speed["models"]
        where += f", {speed['dtype']}" if "dtype" in speed else ""
        written, read = (f" of {speed[key]}" if key in speed else "" for key in ("new_tokens", "prompt"))
        compiled = " (packed: compiled)" if ours.get("compiled") else ""
        decode, prefill = f"decode{written}, tokens/s{compiled}", f"prefill{read}, tokens/s"
        for key, label in (("decode_speed", decode), ("prefill_speed", prefill)):
            lines.append(f"| {label} | {where} | {ours[key]:.1f} | {f'{rest[0][key]:.1f}' if rest else ''} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _score(score: dict[str, Any]) -> str:
    return f"{score['value']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")


def _certificate(report: dict[str, Any]) -> str:
    layers = report["layers"]
    least = min(layer["certificate"]["floors"].get("16", 0) for layer in layers)
    share = min(layer["certificate"]["input_degree_min"] / layer["out_features"] for layer in layers)
    n, m = report["summary"]["pattern"].split(":")
    return (
        f"Every group of {m} inputs keeps exactly {n} in every row, unless a layer has a pattern of its own. Every "
        f"input of every layer keeps at least {least} of every 16 outputs, the weakest {share:.1%} of all; "
        f"{report['summary']['starved_inputs']} inputs are starved. `optimum-cli eggs inspect` checks it from the "
        "files."
    )


def read_card(file: Path) -> str:
    """The text of a README.md.

    Raises:
        ModelError: it is no UTF-8, or may not be read.
    """
    why = no_file(file)
    if why:
        raise ModelError(f"{file}: {why}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{CARD_NAME}: is no UTF-8 text ({first_line(error)}); save it as UTF-8") from error


def parsed(text: str) -> ModelCard:
    """A card from its text.

    Raises:
        ModelError: its metadata cannot be read.
    """
    try:
        return ModelCard(text)
    except (YAMLError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{CARD_NAME}: its metadata, between the first two ---, cannot be read ({first_line(error)}); mend it"
        ) from error


def has_own_text(readme: str) -> bool:
    """Whether a card says anything besides its metadata, a title at its head, and what is between our markers."""
    text = parsed(readme).text
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + text[text.index(END) + len(END) :]
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines[1:] if lines and lines[0].startswith("# ") else lines)


def own_card(folder: Path) -> str | None:
    """The card of a folder, which is to be replaced, if it has text of the user's own.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    text = read_card(path)
    return text if has_own_text(text) else None


def put_card(text: str | None, folder: Path) -> None:
    """Put the text of [`own_card`] into the folder that takes the place of the other, if there is one."""
    if text is not None:
        (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _merged(existing: ModelCard, made: ModelCard) -> ModelCard:
    """The user's card with our part put between the markers, or behind it; and our metadata where the user has none.

    A title is ours, and gives way to the new one, if it is that of the repository, or folder, of our part before.
    """
    ours = made.text[made.text.index(BEGIN) : made.text.index(END) + len(END)]
    text, title = existing.text, None
    if BEGIN in text and END in text:
        before, part, behind = text[: text.index(BEGIN)], text[: text.index(END)], text[text.index(END) + len(END) :]
        title = _title(part[len(before) :])
        if title is not None:
            line = re.compile(rf"^# {re.escape(title)}$", re.MULTILINE)
            before = line.sub(lambda _: f"# {_title(ours)}", before, count=1)
        text = before + ours + behind
    else:
        text = f"{text.rstrip()}\n\n{ours}\n"
    theirs, own = existing.data.to_dict(), made.data.to_dict()
    if title is not None and theirs.get("model_name") == title:
        del theirs["model_name"]
    data = own | theirs
    data["tags"] = list(dict.fromkeys([*(theirs.get("tags") or []), *(own.get("tags") or [])]))
    if "model-index" in own:
        data["model-index"] = own["model-index"]
    return ModelCard(f"---\n{ModelCardData(**data, ignore_metadata_errors=True).to_yaml()}\n---\n{text}")


def _title(part: str) -> str | None:
    """The title that goes with our part of a card: the last part of what its code loads."""
    found = re.search(r'from_pretrained\("(?:[^"\n]*/)?([^"/\n]+)"\)', part)
    return found[1] if found else None
