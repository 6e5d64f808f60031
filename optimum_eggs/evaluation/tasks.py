"""Tasks of lm-evaluation-harness, run on models that are loaded already."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, EGGSError, first_line, is_out_of_memory
from .paired import Estimate, estimate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """What a metric came to, and its standard error where the harness gives one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """A model's result in one task, or in one group of tasks.

    Attributes:
        version: The task's own, as the harness states it.
        num_fewshot: Examples before each question; None for a group, whose tasks may differ.
        documents: How many were answered.
        metrics: By name; `name (filter)` where the answer was filtered first.
        by_document: Of metrics that are means over the documents, the value of each document.
    """

    task: str
    version: str
    num_fewshot: int | None
    documents: int
    metrics: dict[str, Score]
    by_document: dict[str, list[float]]


@dataclass(frozen=True)
class TaskRunner:
    """Which tasks to run, checked, and how."""

    tasks: tuple[str, ...]
    manager: Any
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 1

    @classmethod
    def create(
        cls,
        tasks: Sequence[str],
        *,
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        apply_chat_template: bool = False,
        batch_size: int = 1,
    ) -> TaskRunner:
        """Look the tasks up and read their data, before any model is loaded.

        Args:
            tasks: Names of tasks, groups or tags; shell-style patterns.
            include_path: Folder with YAML files of further tasks.
            num_fewshot: Examples before each question; default: as the task says.
            limit: Only the first documents of each task; to try things out.
            apply_chat_template: Wrap the questions as the tokenizer's chat template says.
            batch_size: Requests answered at a time.

        Raises:
            ConfigError: the harness is not installed, a task is unknown to it, its data cannot be had, it is marked as
                unsafe, or a value is out of range.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError("tasks are run by lm-evaluation-harness: pip install 'lm_eval>=0.4.12'") from error
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(
                f"include_path={str(include_path)!r} is no folder; name the one with the tasks' YAML files"
            )
        for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        for task in tasks:
            if not manager.match_tasks([task]):
                near = difflib.get_close_matches(task, manager.all_tasks, 3)
                raise ConfigError(
                    f"task {task!r} is unknown to lm-evaluation-harness"
                    + (f"; did you mean {' or '.join(near)}?" if near else "")
                    + "; `lm-eval ls tasks` lists all, and --include-path adds a folder of your own"
                )
        with _refusals(tasks):
            loaded = manager.load(manager.match_tasks(list(tasks)))["tasks"]
        for name, task in loaded.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"task {name!r} runs code that the model writes, which is refused here; leave it out, or run it by "
                    "lm-evaluation-harness itself"
                )
        return cls(tuple(tasks), manager, num_fewshot, limit, apply_chat_template, batch_size)

    @torch.no_grad()
    def run(self, model: Any, tokenizer: Any) -> list[TaskScore]:
        """Run the tasks on a model.

        Raises:
            ConfigError: a task cannot be run.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _refusals(self.tasks):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=self.manager.match_tasks(list(self.tasks)),
                task_manager=self.manager,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                apply_chat_template=self.apply_chat_template,
                bootstrap_iters=1000,
            )
        assert found is not None
        return scores(found, self.tasks)


def scores(found: dict[str, Any], asked: Sequence[str]) -> list[TaskScore]:
    """What the harness returned: each group asked for by name as one, and every other task by itself."""
    groups = [name for name in asked if name in found.get("groups", {})]
    members = {name: _leaves(name, found["group_subtasks"]) for name in groups}
    covered = {leaf for leaves in members.values() for leaf in leaves}
    counts = {name: int(count["effective"]) for name, count in found["n-samples"].items()}
    result = []
    for name in [*groups, *(task for task in counts if task not in covered)]:
        metrics = _metrics(found["groups" if name in members else "results"][name])
        samples = [] if name in members else found["samples"][name]
        result.append(
            TaskScore(
                name,
                str(found["versions"].get(name)),
                None if name in members else int(found["n-shot"][name]),
                sum(counts[leaf] for leaf in members.get(name, [name])),
                metrics,
                {metric: values for metric in metrics if (values := _by_document(metric, metrics, samples))},
            )
        )
    return result


def task_differences(ours: TaskScore, theirs: TaskScore) -> dict[str, Estimate]:
    """Of each metric that is a mean over the same documents, how much more the first model got."""
    return {
        metric: estimate(torch.tensor(values) - torch.tensor(theirs.by_document[metric]), torch.ones(len(values)))
        for metric, values in ours.by_document.items()
        if len(theirs.by_document.get(metric, [])) == len(values)
    }


@contextmanager
def _refusals(tasks: Sequence[str]) -> Iterator[None]:
    """What goes wrong within, said in one way: the harness, its metrics, data sets and tasks' own code raise anything.

    Raises:
        ConfigError: something did, but for memory that is out.
    """
    try:
        yield
    except EGGSError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"tasks={list(tasks)}: cannot be run: {type(error).__name__}: {first_line(error)}; see that their data and "
            "the packages they need can be had, or name tasks of your own with --include-path"
        ) from error


def _leaves(name: str, subtasks: dict[str, list[str]]) -> list[str]:
    below = subtasks.get(name, [])
    return [leaf for child in below for leaf in _leaves(child, subtasks)] if below else [name]


def _metrics(row: dict[str, Any]) -> dict[str, Score]:
    """From the harness's `metric,filter` and `metric_stderr,filter`."""
    metrics = {}
    for key, value in row.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{name}_stderr,{chosen}")
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        label = name if chosen == "none" else f"{name} ({chosen})"
        if not math.isfinite(value):  # of no documents, or beyond what a number holds
            logger.warning(
                "%s: the harness gave %s for %s, which is left out", row.get("alias", "a task"), value, label
            )
            continue
        metrics[label] = Score(float(value), float(stderr) if known else None)  # type: ignore[arg-type]
    return metrics


def _by_document(label: str, metrics: dict[str, Score], samples: list[dict[str, Any]]) -> list[float]:
    """The metric in each document, in their order; nothing if it is no mean of them."""
    name, _, chosen = label.partition(" (")
    rows = [row for row in samples if row.get("filter") == (chosen[:-1] or "none") and name in row]
    if not rows or not all(isinstance(row[name], int | float) for row in rows):
        return []
    values = [float(row[name]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    is_mean = math.isclose(sum(values) / len(values), metrics[label].value, rel_tol=1e-6, abs_tol=1e-9)
    return values if is_mean else []
