"""Experts that transformers holds as 3-D parameters, as one linear layer for each expert and matrix, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a mixture as 3-D parameters, in the way transformers does.

    That is what its `use_experts_implementation` makes: `gate_up_proj` or `up_proj`, and `down_proj`, with or without
    biases, transposed or not. Experts with a norm of their own behind them are not split.
    """
    # Versions of transformers before that norm do not say whether there is one; a norm has weights, in a module below.
    if not hasattr(module, "_apply_gate") or getattr(module, "has_post_expert_norm", False):
        return False
    own = dict(module.named_parameters())
    names = _matrices(module)
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    return own.keys() == {*names, *biases} and all(own[name].dim() == 3 for name in names)


class SplitExperts(nn.Module):
    """The experts of a mixture, each a module of its own with linear layers: `"0.gate_up_proj"`, `"0.down_proj"`.

    It computes what the module it is made of computes by its own (`"eager"`) forward, and adds up in the dtype of the
    hidden states. Its weights are views of the 3-D parameters, until they are replaced.

    Args:
        fused: A module of which [`is_fused_experts`] holds, on any device.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        shell: Any = copy.copy(fused)
        shell._parameters = {name: _like(value, value.to("meta")) for name, value in fused.named_parameters()}
        self._shell = (shell,)  # in a tuple, so that it is no submodule: it has the gate and the shapes, no weights
        for expert in range(fused.num_experts):
            part = nn.Module()
            for name in _matrices(fused):
                weight = _weight_of(fused, name, expert)
                columns, rows = weight.shape[1], weight.shape[0]
                part.add_module(name, nn.Linear(columns, rows, fused.has_bias, device="meta", dtype=weight.dtype))
            self.add_module(str(expert), part)
        self.take(fused)
        self.train(fused.training)

    def take(self, fused: Any) -> None:
        """Let the linear layers be views of the parameters of `fused`, of the same shapes."""
        for name in _matrices(fused):
            parameter = fused.get_parameter(name)
            bias = fused.get_parameter(f"{name}_bias") if fused.has_bias else None
            for expert in range(fused.num_experts):
                linear = self.get_submodule(f"{expert}.{name}")
                linear.weight = _like(parameter, _weight_of(fused, name, expert))
                if bias is not None:
                    linear.bias = _like(bias, bias.detach()[expert])

    def own_memory(self) -> None:
        """Copy the weights that are still dense, so that what they are views of can go."""
        for parameter in self.parameters():
            if parameter.untyped_storage().nbytes() != parameter.nbytes or not parameter.is_contiguous():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def hollow(self) -> Any:
        """A module of the kind that was split, with its parameters on the meta device."""
        shell = copy.copy(self._shell[0])
        shell._parameters = dict(shell._parameters)
        return shell.train(self.training)

    @torch.no_grad()
    def join(self) -> nn.Module:
        """The experts as 3-D parameters again, copied from linear layers that are all dense."""
        fused = self.hollow()
        for name in fused._parameters:
            matrix, part = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
            values = [self.get_parameter(f"{expert}.{matrix}.{part}") for expert in range(fused.num_experts)]
            stacked = torch.stack([value.detach() for value in values])
            if part == "weight" and fused.is_transposed:
                stacked = stacked.transpose(1, 2).contiguous()
            asked = any(value.requires_grad for value in values)
            fused._parameters[name] = nn.Parameter(stacked, requires_grad=asked)
        return fused

    def waves(self) -> list[list[str]]:
        """Names of the linear layers, those together whose inputs do not hang on one another, in the order they run."""
        shell = self._shell[0]
        return [[f"{expert}.{name}" for expert in range(shell.num_experts)] for name in _matrices(shell)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states (tokens, hidden), the experts of each token and their weights (tokens, k), to (tokens, hidden).

        An index that is the number of experts stands for none.

        Raises:
            ShapeError: an index is negative, or above the number of experts.
        """
        shell = self._shell[0]
        first, last = _matrices(shell)
        output = torch.zeros_like(hidden_states)
        chosen, order = top_k_index.flatten().sort(stable=True)  # by expert, and by token within an expert
        experts = torch.arange(shell.num_experts + 2, device=chosen.device, dtype=chosen.dtype)
        *bounds, legal = torch.searchsorted(chosen, experts).tolist()  # the one place where a GPU is waited for
        if bounds[0] or legal != len(chosen):
            raise ShapeError(
                f"top_k_index has {bounds[0]} values below 0 and {len(chosen) - legal} above {shell.num_experts}, the "
                "number of experts; look at the router that chose them"
            )
        for expert, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                continue
            tokens, place = order[start:end] // top_k_index.shape[1], order[start:end] % top_k_index.shape[1]
            part = self.get_submodule(str(expert))
            states = part.get_submodule(first)(hidden_states[tokens])
            states = shell._apply_gate(states) if shell.has_gate else shell.act_fn(states)
            states = part.get_submodule(last)(states) * top_k_weights[tokens, place, None]
            output.index_add_(0, tokens, states.to(output.dtype))
        return output


def split_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Split all fused experts of `model`, in place. Returns what was there, by dotted name."""
    fused = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    for name, module in fused.items():
        model.set_submodule(name, SplitExperts(module))
    return fused


def join_experts(model: nn.Module, join: Callable[[SplitExperts], nn.Module] = SplitExperts.join) -> None:
    """Undo [`split_experts`], in place, on a model whose experts are all dense."""
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    for name, module in split.items():
        model.set_submodule(name, join(module))
    if split:
        vars(model).pop("_weight_conversions", None)  # transformers knows those of the architecture


def keep_names(model: nn.Module) -> None:
    """Have transformers save the weights of `model` by the names that they have.

    It has others for some architectures, and for fused experts conversions from and to one tensor for each expert,
    which would take split ones for those.
    """
    model._weight_conversions = []  # type: ignore[assignment]


def conversions_for(model: nn.Module, conversions: Sequence[Any]) -> list[Any]:
    """Of the conversions that transformers has for a checkpoint, those that `model` needs.

    Where experts are split, what makes their 3-D parameters of other tensors is not among them.
    """
    split = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    fused = tuple(f"{name}.{matrix}{end}" for name in split for matrix in _ALL_MATRICES for end in ("", "_bias"))
    return [
        conversion
        for conversion in conversions
        if not (hasattr(conversion, "operations") and any(t.endswith(fused) for t in conversion.target_patterns))
    ]


def has_split_experts(model: nn.Module) -> bool:
    """Whether experts of `model` are split."""
    return any(isinstance(module, SplitExperts) for module in model.modules())


_ALL_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


def _matrices(fused: Any) -> tuple[str, str]:
    """The names of the two matrices of an expert, in the order they run."""
    return ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")


def _weight_of(fused: Any, name: str, expert: int) -> Tensor:
    """(out, in), a view."""
    weight = fused.get_parameter(name).detach()[expert]
    return weight.t() if fused.is_transposed else weight


def _like(parameter: Tensor, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
