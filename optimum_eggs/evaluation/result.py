"""What an evaluation gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .paired import Comparison, Estimate
from .perplexity import Perplexity
from .size import ModelSize
from .tasks import TaskScore


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        folder: Where it was loaded from; None for a model in memory.
        dtype: What it ran in.
        size: Its parameters and bytes.
        pruned_layers: Names of its packed layers.
        pruned: Whether it is packed, or stores the zeros that the other model has packed.
        perplexity: On the text, if there was one.
        token_digest: SHA-256 of the text's token ids.
        tasks: Results of lm-evaluation-harness.
        text_uses: What else the model's report says was done on the text: `"calibrated"`, `"trained"`.
    """

    folder: str | None
    dtype: str
    size: ModelSize
    pruned_layers: list[str]
    pruned: bool
    perplexity: Perplexity | None = None
    token_digest: str | None = None
    tasks: list[TaskScore] = field(default_factory=list)
    text_uses: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without the single answers of the tasks."""
        found = asdict(self)
        for task in found["tasks"]:
            del task["by_document"]
        return found


@dataclass(frozen=True)
class Conditions:
    """What the models were judged on, as others may know it.

    Attributes:
        text: Name of the text: a file without its folders, or a data set; None without a text.
        split: Of a data set from the Hub.
        seq_len, stride: Tokens in a window, and from one window to the next.
        apply_chat_template: Whether tasks were asked as the tokenizer's chat template says.
        text_sha256: Of the bytes of a file.
    """

    text: str | None
    split: str | None
    seq_len: int
    stride: int
    apply_chat_template: bool = False
    text_sha256: str | None = None

    @property
    def described(self) -> dict[str, Any]:
        """Name, split and SHA-256 of the text, as a recipe lists its calibration texts."""
        return {"name": self.text, "split": self.split, "sha256": self.text_sha256}


@dataclass(frozen=True)
class EvaluationResult:
    """What [`evaluate`] found.

    Attributes:
        model: Of the model asked about.
        against: Of the model it was compared with, if there was one.
        comparison: The first against the second on the windows of the text.
        task_differences: Task -> metric -> how much more the first got, for metrics that are means over documents.
        conditions: What both were judged on.
    """

    model: Evaluation
    conditions: Conditions
    against: Evaluation | None = None
    comparison: Comparison | None = None
    task_differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the ratios of the two models' sizes and perplexities."""
        found: dict[str, Any] = {"model": self.model.to_dict()}
        if self.against is not None:
            found |= {"against": self.against.to_dict(), "ratio": _ratios(self.model, self.against)}
        if self.comparison is not None:
            found["comparison"] = asdict(self.comparison)
        if self.task_differences:
            found["task_differences"] = {
                task: {name: asdict(each) for name, each in metrics.items()}
                for task, metrics in self.task_differences.items()
            }
        return found


def _ratios(first: Evaluation, second: Evaluation) -> dict[str, float]:
    pairs: dict[str, tuple[float | None, float | None]] = {
        "weight_bytes": (first.size.weight_bytes, second.size.weight_bytes),
        "pruned_layer_bytes": (first.size.pruned_layer_bytes, second.size.pruned_layer_bytes),
    }
    if first.perplexity is not None and second.perplexity is not None:
        pairs["perplexity"] = (first.perplexity.perplexity, second.perplexity.perplexity)
    return {name: ours / theirs for name, (ours, theirs) in pairs.items() if ours is not None and theirs}
