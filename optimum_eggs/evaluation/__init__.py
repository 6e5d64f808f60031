"""Judging a model: perplexity, tasks, two models compared, and what a model takes on disk."""

from .paired import Comparison, Estimate, compare
from .perplexity import Perplexity, perplexity
from .reading import Reading, read
from .size import ModelSize, model_size
from .tasks import Score, TaskRunner, TaskScore, task_differences

__all__ = [
    "Comparison",
    "Estimate",
    "ModelSize",
    "Perplexity",
    "Reading",
    "Score",
    "TaskRunner",
    "TaskScore",
    "compare",
    "model_size",
    "perplexity",
    "read",
    "task_differences",
]
