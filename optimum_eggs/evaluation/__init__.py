"""Judging a model: perplexity, tasks, two models compared, and what a model takes on disk."""

from .evaluate import evaluate
from .paired import Comparison, Estimate, compare
from .perplexity import Perplexity, perplexity
from .reading import Reading, read
from .record import record
from .result import Conditions, Evaluation, EvaluationResult
from .size import ModelSize, model_size
from .tasks import Score, TaskRunner, TaskScore, task_differences

__all__ = [
    "Comparison",
    "Conditions",
    "Estimate",
    "Evaluation",
    "EvaluationResult",
    "ModelSize",
    "Perplexity",
    "Reading",
    "Score",
    "TaskRunner",
    "TaskScore",
    "compare",
    "evaluate",
    "model_size",
    "perplexity",
    "read",
    "record",
    "task_differences",
]
