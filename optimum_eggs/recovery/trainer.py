"""transformers' Trainer, with the loss of recovery."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback

from ..engine.rates import sizes
from ..errors import NumericalError
from ..evaluation.finite import first_not_finite, plain_name
from .distill import block_error
from .loss import distillation_loss

_REMEDY = "use a smaller learning rate (--lr)"


class _Bar(ProgressCallback):
    """The progress bar alone."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the losses are in the report."""


class StopWhenWorse(TrainerCallback):
    """Ends training when the loss on what is held out was no lower than the one before, so many times in a row.

    Not when the best is long ago: with a rate that rises first and then falls to zero, the loss may rise at the highest
    rates, above that of the first steps, and be far lower at the end.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the losses so far, those of an interrupted run included."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry][-self.patience - 1 :]
        if len(losses) > self.patience and all(after >= before for before, after in pairwise(losses)):
            control.should_training_stop = True


class RecoveryTrainer(Trainer):
    """Minimises the divergence from the teacher where a batch brings its tokens, the language-model loss elsewhere.

    Args:
        args: As for `Trainer`.
        teacher: Run beside the model to match the output of its blocks, if `block_matching` is not 0.
        kd_ratio: Share of that divergence, the rest being the language-model loss.
        block_matching: Weight of the blocks' relative squared error in the loss.
        autocast: Multiply in bfloat16. The arguments' `bf16` would do so too, and copy all logits to float32.
        kwargs: As for `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        kd_ratio: float = 1.0,
        block_matching: float = 0.0,
        autocast: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = None if teacher is None else teacher.to(self.args.device)
        self._kd_ratio, self._block_matching, self._autocast = kd_ratio, block_matching, autocast
        for callback in (PrinterCallback, ProgressCallback):  # both write to stdout, which belongs to the command
            self.remove_callback(callback)
        self.add_callback(_Bar)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, `learning_rate` being a share of the size of what each parameter changes."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            share, options["weight_decay"] = options.pop("lr"), self.args.weight_decay
            self.optimizer = kind(parameter_groups(cast(nn.Module, self.model), share), **options)
        return self.optimizer

    def compute_loss_context_manager(self) -> Any:
        """What the loss is computed in."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._autocast)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean over the tokens of the batch."""
        ids, log_probs = inputs.pop("teacher_ids", None), inputs.pop("teacher_log_probs", None)
        matching = self._teacher is not None and self._block_matching > 0
        if ids is None:
            outputs = model(**inputs)
            loss: Tensor = outputs.loss
        else:
            outputs = model(input_ids=inputs["input_ids"], output_hidden_states=matching)
            following = inputs["input_ids"].roll(-1, 1)
            following[:, -1] = -1
            logits, ids, log_probs, following = (
                each.flatten(0, 1) for each in (outputs.logits, ids, log_probs, following)
            )
            loss = distillation_loss(logits, ids, log_probs, following, self._kd_ratio)
        if matching:
            assert self._teacher is not None
            with torch.no_grad(), torch.autocast(self.args.device.type, enabled=False):  # in its own dtype
                theirs = self._teacher(input_ids=inputs["input_ids"], output_hidden_states=True, use_cache=False)
            error = block_error(outputs.hidden_states[1:], theirs.hidden_states[1:])  # the first is the embedding
            loss = loss + self._block_matching * error
        if not bool(torch.isfinite(loss)):
            raise NumericalError(self._not_finite(model, inputs["input_ids"]))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step; its gradients must be finite.

        Raises:
            NumericalError: they, or the loss, are not.
        """
        loss = super().training_step(*args, **kwargs)
        parameters = cast(nn.Module, self.model).named_parameters()
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients.values(), float("inf")))):
            name = next(name for name, grad in gradients.items() if not bool(torch.isfinite(grad).all()))
            raise NumericalError(
                f"step {self.state.global_step + 1}: the gradient of {plain_name(name)} is NaN or infinite; {_REMEDY}"
            )
        return loss

    def _not_finite(self, model: Any, ids: Tensor) -> str:
        """Where a loss that is not finite comes from."""
        run = {"the model": model} | ({} if self._teacher is None else {"the teacher": self._teacher})
        layers = {name: first_not_finite(each, partial(each, input_ids=ids)) for name, each in run.items()}
        found = [f"of {layer} in {name}" for name, layer in layers.items() if layer is not None]
        where = f"the first such output is that {found[0]}" if found else "the outputs of all layers are finite"
        step = f"{'' if model.training else 'after '}step {self.state.global_step + model.training}"
        return f"{step}: the loss is NaN or infinite, and {where}; {_REMEDY}"


def parameter_groups(model: nn.Module, share: float) -> list[dict[str, Any]]:
    """A group for each parameter that is trained, its `lr` being `share` of the root mean square of what it changes.

    That is the layer's own weight for the two factors of a LoRA, and otherwise the parameter itself.
    """
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    changes: dict[int, Tensor] = {
        id(parameter): module.get_base_layer().weight
        for module in adapted
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_size = sizes([changes.get(id(parameter), parameter) for parameter in trained])
    return [{"params": [each], "lr": share * size} for each, size in zip(trained, of_size, strict=True)]
