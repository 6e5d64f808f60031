"""Putting what was measured into the report of a saved model, from where the model card takes it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.report import read_report, update_report
from .result import Evaluation, EvaluationResult


def record(result: EvaluationResult, folder: str | Path | None = None) -> bool:
    """Put a result into the `report.json` of its model, in place of an earlier one of the same tokens.

    Of the other model only what a dense one gave: the report says nothing of other pruned models, packed or not.

    Args:
        result: Of [`evaluate`].
        folder: The packed model. Default: where the model was loaded from.

    Returns:
        Whether the folder has a report.

    Raises:
        CheckpointError: the report is damaged.
        OutputError: it cannot be written.
    """
    folder = result.model.folder if folder is None else folder
    if folder is None:
        return False
    dense = None if result.against is None or result.against.pruned else result.against
    before = read_report(folder)
    parts: dict[str, Any] = {}
    if result.model.perplexity is not None:
        entry = _perplexity_entry(result, dense)
        same = ("dataset", "split", "tokens_sha256", "conditions")
        parts["evaluations"] = _replaced(before.get("evaluations") or [], [entry], same)
    if result.model.tasks:
        entries = [_task_entry(result, dense, index) for index in range(len(result.model.tasks))]
        parts["tasks"] = _replaced(before.get("tasks") or [], entries, ("task", "version", "conditions"))
    return update_report(folder, **parts)


def _replaced(before: list[Any], entries: list[dict[str, Any]], same: tuple[str, ...]) -> list[Any]:
    kept = [other for other in before if all(any(other.get(key) != entry[key] for key in same) for entry in entries)]
    return [*kept, *entries]


def _perplexity_entry(result: EvaluationResult, dense: Evaluation | None) -> dict[str, Any]:
    ours, asked = result.model, result.conditions
    assert ours.perplexity is not None
    found = asdict(ours.perplexity)
    overlap = "" if asked.stride == asked.seq_len else f" with stride {asked.stride}"
    entry: dict[str, Any] = {
        "dataset": asked.text,
        "split": asked.split,
        "conditions": f"{found['windows']} windows of {found['seq_len']} tokens{overlap}, {ours.dtype}",
        "tokens_sha256": ours.token_digest,
        "text_sha256": asked.text_sha256,
        "metrics": {key: found[key] for key in ("perplexity", "bits_per_byte") if found[key] is not None},
    }
    if dense is not None and dense.perplexity is not None and result.comparison is not None:
        theirs = asdict(dense.perplexity)
        entry["dense"] = {key: theirs[key] for key in entry["metrics"]}
        entry["comparison"] = asdict(result.comparison)
    return entry


def _task_entry(result: EvaluationResult, dense: Evaluation | None, index: int) -> dict[str, Any]:
    found = result.model.tasks[index]
    shots = "" if found.num_fewshot is None else f"{found.num_fewshot} examples each, "
    template = "chat template, " if result.conditions.apply_chat_template else ""
    entry: dict[str, Any] = {
        "task": found.task,
        "version": found.version,
        "conditions": f"{found.documents} documents, {shots}{template}{result.model.dtype}",
        "metrics": {name: asdict(score) for name, score in found.metrics.items()},
    }
    if dense is not None:
        differences = result.task_differences[found.task]
        entry["dense"] = {name: asdict(score) for name, score in dense.tasks[index].metrics.items()}
        entry["difference"] = {name: asdict(each) for name, each in differences.items()}
    return entry
