"""Packed models in vLLM: how their layers are stored and run.

vLLM holds layers of the same inputs (q, k and v; gate and up) as one, and splits layers over processes by rows or by
columns; the packed form can be cut either way. On a CPU the layers call the kernels that `NMLinear` calls; elsewhere,
where no kernel is known to be faster, they are made dense when they are loaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from ..errors import CheckpointError, ModelError
from ..ops import nm_linear
from ..ops.coded_linear import coded_linear, values_of
from ..packing import meta_width, packed_width, unpack
from ..packing.checkpoint import check_packed_tensors, check_version, codings, pruned_patterns
from ..packing.codes import Coding
from ..pattern import NMPattern

NAME = "eggs"
_EXPORT = "make the model dense for vLLM with `optimum-cli eggs export MODEL OUT --format dense`"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own


def register() -> None:
    """Make the format known to vLLM; more than once does no harm."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(EGGSServingConfig)


class EGGSServingConfig(QuantizationConfig):
    """What the `quantization_config` of a packed model says of each layer."""

    def __init__(self, patterns: Mapping[str, NMPattern], kinds: Mapping[str, Coding], matrices: bool = False) -> None:
        super().__init__()
        self.patterns, self.kinds, self.matrices = dict(patterns), dict(kinds), matrices

    def get_name(self) -> Any:
        """As in `quant_method`."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the kernels."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: layers are dense there."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EGGSServingConfig:
        """Of a `quantization_config`.

        Raises:
            CheckpointError: its version is unknown, or its lists of layers are missing or damaged.
            ModelError: it lists experts.
        """
        check_version(config)
        patterns, kinds = pruned_patterns(config), codings(config)
        expert = next((name for name in (*patterns, *kinds) if _EXPERT.search(name)), None)
        if expert is not None:
            raise ModelError(f"{expert}: packed experts are not served by vLLM; {_EXPORT}")
        return cls(patterns, kinds, bool(config.get("matrix_norms")))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that vLLM has for the modules."""
        self.patterns = hf_to_vllm_mapper.apply_dict(self.patterns)
        self.kinds = hf_to_vllm_mapper.apply_dict(self.kinds)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is stored and run.

        Raises:
            ModelError: vLLM holds as one what is stored in several ways.
        """
        if self.matrices:
            let_norms_take_matrices()  # in the process that makes the layers, which begins with those asked for here
        if isinstance(layer, LinearBase):
            pattern, coding = self._how(prefix)
            return UnquantizedLinearMethod() if pattern is coding is None else StoredLinear(pattern, coding)
        if isinstance(layer, VocabParallelEmbedding):  # a head too
            _, coding = self._how(prefix or self._embeddings())
            return CodedVocabulary(coding) if coding else HeadOrEmbedding()
        return None

    def _embeddings(self) -> str:
        """The embeddings of integers, which some models of vLLM make without their name."""
        coded = [name for name in self.kinds if name not in self.patterns and name.endswith(_EMBEDDINGS)]
        return coded[0] if len(coded) == 1 else ""

    def _how(self, prefix: str) -> tuple[NMPattern | None, Coding | None]:
        parent, _, own = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(own, [own])]
        found = {part: (self.patterns.get(part), self.kinds.get(part)) for part in parts}
        ways = set(found.values())
        if len(ways) > 1:
            said = ", ".join(
                f"{part} {pattern or 'dense'} {coding or 'floats'}" for part, (pattern, coding) in found.items()
            )
            raise ModelError(
                f"vLLM holds {prefix} as one layer, and its parts are stored in several ways ({said}); {_EXPORT}"
            )
        return ways.pop()


class StoredLinear(LinearMethodBase):
    """A linear layer whose weight is packed, or of integers, or both.

    Attributes of the layer: weight (out, in·n/m) or its codes; weight_meta (out, ⌈in/8⌉); weight_scale
    (out, ⌈in/group⌉).
    """

    def __init__(self, pattern: NMPattern | None, coding: Coding | None) -> None:
        self.pattern, self.coding = pattern, coding
        self.n, self.m = (1, 1) if pattern is None else (pattern.n, pattern.m)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the part of the weight that this process holds.

        Raises:
            ModelError: the columns cannot be cut so.
        """
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        self._check_cut(layer.prefix, columns, input_size)
        load = extra_weight_attrs.pop("weight_loader")
        for name, (width, dtype) in self._stored(columns, params_dtype).items():
            whole, _ = self._stored(input_size, params_dtype)[name]
            parameter = Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
            checked = partial(_load, load, f"{layer.prefix}: {name}", whole)
            known = {"input_dim": 1, "output_dim": 0, "weight_loader": checked, "parts": []}
            set_weight_attrs(parameter, known | extra_weight_attrs)
            layer.register_parameter(name, parameter)
        layer.in_features, layer.dtype, layer.is_dense = columns, params_dtype, False
        layer.parts = len(output_partition_sizes)

    def _stored(self, columns: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """Width and dtype of each tensor of rows of so many inputs."""
        width = columns if self.pattern is None else packed_width(columns, self.pattern)
        stored = {"weight": (width, dtype)}
        if self.coding is not None:
            stored["weight"] = self.coding.width(width), self.coding.dtype
            stored["weight_scale"] = self.coding.scales(columns), torch.bfloat16
        if self.pattern is not None:
            stored["weight_meta"] = meta_width(columns), torch.uint8
        return stored

    def _check_cut(self, name: str, columns: int, whole: int) -> None:
        step = max(8, self.m, self.coding.group if self.coding else 1)  # each is a power of two, or a multiple of 64
        if columns != whole and columns % step:
            raise ModelError(
                f"{name}: {whole} inputs cannot be split over {whole // columns} processes, since each must have a "
                f"multiple of {step}; use a smaller tensor_parallel_size"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was read; on other devices than a CPU, make it dense.

        Raises:
            CheckpointError: a tensor is missing, or bits or values are damaged.
        """
        for name, parameter in layer.named_parameters(recurse=False):
            if name in self._stored(layer.in_features, layer.dtype) and not _is_whole(parameter, layer.parts):
                raise CheckpointError(f"{layer.prefix}: {name} is missing in the files; download the checkpoint again")
        weight, scale, meta = layer.weight.data, _part(layer, "weight_scale"), _part(layer, "weight_meta")
        check_packed_tensors(layer.prefix, weight, meta, self.pattern, scale, self.coding)
        if weight.device.type != "cpu":
            logger.warning_once(
                "Packed layers are dense on %s, for no kernel is known to be faster there.", weight.device.type
            )
            self.make_dense(layer)

    def make_dense(self, layer: Any) -> None:
        """Hold the dense weight (out, in) in place of what is stored, zeros in place."""
        layer.weight = Parameter(self._dense(layer), requires_grad=False)
        layer.is_dense = True
        for name in ("weight_scale", "weight_meta"):
            layer.register_parameter(name, None)

    def _dense(self, layer: Any) -> Tensor:
        values = layer.weight.data
        if self.coding is not None:
            kind, group = self.coding.kind, self.coding.group
            values = values_of(
                values, layer.weight_scale.data, layer.in_features, self.n, self.m, kind, group, layer.dtype
            )
        return values if self.pattern is None else unpack(values, layer.weight_meta.data, self.pattern)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X (..., in) to (..., out)."""
        if layer.is_dense:
            return torch.nn.functional.linear(x, layer.weight, bias)
        if self.coding is None:
            return nm_linear(x, layer.weight, layer.weight_meta, bias, self.n, self.m)
        kind, group = self.coding.kind, self.coding.group
        meta = _part(layer, "weight_meta")
        return coded_linear(x, layer.weight, layer.weight_scale, meta, bias, self.n, self.m, kind, group)


class CodedVocabulary(StoredLinear):
    """Embeddings of integers, or a head of them; or both, where the model ties them."""

    coding: Coding

    def __init__(self, coding: Coding) -> None:
        super().__init__(None, coding)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Ids (...) to vectors (..., hidden)."""
        if layer.is_dense:
            return torch.nn.functional.embedding(input_, layer.weight)
        ids = input_.flatten()
        codes, scale = (torch.nn.functional.embedding(ids, part) for part in (layer.weight, layer.weight_scale))
        kind, group = self.coding.kind, self.coding.group
        vectors = values_of(codes, scale, layer.in_features, 1, 1, kind, group, layer.dtype)
        return vectors.view(*input_.shape, layer.in_features)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head is the embeddings."""
        return embed_tokens


class HeadOrEmbedding(UnquantizedEmbeddingMethod):
    """A vocabulary of floats, or a head that is tied to embeddings of integers, which alone are stored."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head reads the weight of the embeddings, whatever it is."""
        stored = embed_tokens.quant_method
        if isinstance(stored, CodedVocabulary):
            return stored.tie_weights(layer, embed_tokens)
        return super().tie_weights(layer, embed_tokens)


class MatrixNorm(RMSNorm):
    """An RMS norm that multiplies by `matrix` (d, d) in place of gains, which are ones.

    vLLM does not hand a model's norms to those who make its layers, so one becomes such a norm as its weight is read.
    """

    matrix: Parameter

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Hidden states (..., d) to (..., d); with a residual, what is added and normalised, and the sum."""
        given = super().forward(x, residual)
        if residual is None:
            return torch.nn.functional.linear(given, self.matrix)
        return torch.nn.functional.linear(given[0], self.matrix), given[1]


def let_norms_take_matrices() -> None:
    """Have every norm that vLLM makes from now on become a [`MatrixNorm`] where the files hold a matrix for it."""
    make = RMSNorm.__init__
    if getattr(make, "takes_matrices", False):
        return

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if isinstance(getattr(self, "weight", None), Parameter):
            set_weight_attrs(self.weight, {"weight_loader": partial(_load_gains, self)})

    init.takes_matrices = True  # type: ignore[attr-defined]
    RMSNorm.__init__ = init


def _load_gains(norm: Any, parameter: Parameter, loaded: Tensor) -> None:
    """Take what the files hold for a norm: gains (d,), or a matrix (d, d).

    Raises:
        CheckpointError: it is neither.
    """
    size = len(parameter)
    if loaded.dim() != 2:
        default_weight_loader(parameter, loaded)
        return
    if loaded.shape != (size, size):
        raise CheckpointError(
            f"the gains of a norm are {tuple(loaded.shape)} in the file; they must be ({size},) or ({size}, {size}); "
            "download the checkpoint again"
        )
    norm.matrix = Parameter(loaded.to(parameter), requires_grad=False)
    parameter.data.fill_(1)
    norm.__class__ = MatrixNorm


def _load(
    load: Callable[..., Any], name: str, width: int, parameter: Parameter, loaded: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Have vLLM's loader put what is in a file into `parameter`, if it is what is to be there: it casts, and cuts.

    Raises:
        CheckpointError: the dtype or the width is another.
    """
    floats = parameter.is_floating_point() and loaded.is_floating_point()
    if loaded.dim() != 2 or loaded.shape[1] != width or not (floats or loaded.dtype is parameter.dtype):
        raise CheckpointError(
            f"{name} is {tuple(loaded.shape)} of {loaded.dtype} in the file; it must have {width} columns of "
            f"{'floats' if parameter.is_floating_point() else parameter.dtype}; download the checkpoint again"
        )
    done = load(parameter, loaded, *args, **kwargs)
    parameter.parts.append(next(iter((*args, *kwargs.values())), None))  # type: ignore[attr-defined]
    return done


def _is_whole(parameter: Any, parts: int) -> bool:
    """Whether all parts of a layer that vLLM holds as one were read, or the layer as one."""
    return None in parameter.parts or len(set(parameter.parts)) == parts


def _part(layer: Any, name: str) -> Tensor | None:
    return getattr(layer, name, None)
