"""transformers' Trainer, with the loss of recovery."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import ProgressCallback, Trainer
from transformers.trainer_callback import PrinterCallback

from .distill import divergence


class _Bar(ProgressCallback):
    """The progress bar alone."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the losses are in the report."""


class RecoveryTrainer(Trainer):
    """Minimises the divergence from the teacher where a batch brings its tokens, the language-model loss elsewhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):  # both write to stdout, which belongs to the command
            self.remove_callback(callback)
        self.add_callback(_Bar)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean over the tokens of the batch."""
        ids, log_probs = inputs.pop("teacher_ids", None), inputs.pop("teacher_log_probs", None)
        if ids is None:
            outputs = model(**inputs)
            loss: Tensor = outputs.loss
        else:
            outputs = model(input_ids=inputs["input_ids"])
            loss = divergence(outputs.logits.flatten(0, 1), ids.flatten(0, 1), log_probs.flatten(0, 1))
        return (loss, outputs) if return_outputs else loss
