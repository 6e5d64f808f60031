"""Packed models in vLLM: what `vllm serve` finds by the entry point `vllm.general_plugins`.

vLLM holds layers of the same inputs (q, k and v; gate and up) as one, and splits layers over processes by rows or by
columns; the packed form can be cut either way. On a CPU the layers call the kernels that `NMLinear` calls; elsewhere,
where no kernel is known to be faster, they are made dense when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs

from ..errors import ModelError
from ..ops import nm_linear
from ..ops.coded_linear import coded_linear, values_of
from ..packing import meta_width, packed_width, unpack
from ..packing.checkpoint import check_packed_tensors, codings, pruned_patterns
from ..packing.codes import Coding
from ..pattern import NMPattern

NAME = "eggs"
_EXPORT = "make the model dense for vLLM with `optimum-cli eggs export MODEL OUT --format dense`"
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own


def register() -> None:
    """Make the format known to vLLM, which calls this in each of its processes."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(EGGSServingConfig)


class EGGSServingConfig(QuantizationConfig):
    """What the `quantization_config` of a packed model says of each layer."""

    def __init__(self, patterns: Mapping[str, NMPattern], kinds: Mapping[str, Coding]) -> None:
        super().__init__()
        self.patterns, self.kinds = dict(patterns), dict(kinds)

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
            CheckpointError: its lists of layers are missing or damaged.
        """
        return cls(pruned_patterns(config), codings(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that vLLM has for the modules."""
        self.patterns = hf_to_vllm_mapper.apply_dict(self.patterns)
        self.kinds = hf_to_vllm_mapper.apply_dict(self.kinds)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is stored and run.

        Raises:
            ModelError: vLLM holds as one what is stored in several ways, or the layer is a mixture's experts.
        """
        if isinstance(layer, RoutedExperts):
            if any(name.startswith(f"{prefix.rpartition('.experts')[0]}.experts.") for name in self.patterns):
                raise ModelError(f"{prefix}: packed experts are not served by vLLM; {_EXPORT}")
            return None
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
        self._check_cut(getattr(layer, "prefix", ""), columns, input_size)
        width = columns if self.pattern is None else packed_width(columns, self.pattern)
        stored = {"weight": (width, params_dtype)}
        if self.coding is not None:
            stored["weight"] = self.coding.width(width), self.coding.dtype
            stored["weight_scale"] = self.coding.scales(columns), torch.bfloat16
        if self.pattern is not None:
            stored["weight_meta"] = meta_width(columns), torch.uint8
        for name, (width, dtype) in stored.items():
            parameter = Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
            layer.register_parameter(name, parameter)
        layer.in_features, layer.dtype, layer.is_dense = columns, params_dtype, False

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
            CheckpointError: bits or values are damaged.
        """
        weight, scale, meta = layer.weight.data, _part(layer, "weight_scale"), _part(layer, "weight_meta")
        check_packed_tensors(layer.prefix, weight, meta, self.pattern, scale, self.coding)
        if weight.device.type != "cpu":
            logger.warning_once(
                "Packed layers are dense on %s, for no kernel is known to be faster there.", weight.device.type
            )
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
        return (
            stored.tie_weights(layer, embed_tokens)
            if isinstance(stored, CodedVocabulary)
            else super().tie_weights(layer, embed_tokens)
        )


def _part(layer: Any, name: str) -> Tensor | None:
    return getattr(layer, name, None)
