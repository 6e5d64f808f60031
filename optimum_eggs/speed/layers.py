"""One packed layer against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError
from ..huge_pages import huge_memory
from ..masks import topn_mask
from ..ops import INSTRUCTION_SETS, choose, native, nm_linear
from ..ops.coded_linear import coded_linear
from ..ops.select import MOST_TOKENS_CODED
from ..packing import pack, unpack
from ..packing.codes import Coding, decode, nearest_codes, store_codes, whole_range
from ..pattern import NMPattern
from .timing import Seconds, alternate

_MOST_COPIES = 256
_CALLS = 8  # in a turn: a model calls layer after layer, and so finds the code that calls them in the cache


@dataclass(frozen=True)
class LayerTiming:
    """Times of one product X Wᵀ, packed and dense.

    `coding` is that of its values, None for floats. `gigabytes_per_second` is what the packed product reads, over its
    time: the packed weight and its bits, or the dense weight where the backend is `dense`; `others` holds further
    products that were timed in turn with these, by name.
    """

    out_features: int
    in_features: int
    pattern: str
    dtype: str
    tokens: int
    backend: str
    isa: str | None
    packed: Seconds
    dense: Seconds
    ratio: float
    gigabytes_per_second: float
    others: dict[str, Seconds]
    coding: str | None = None


@torch.no_grad()
def read_bandwidth(size: int = 1 << 30, repeats: int = 5) -> float | None:
    """GB/s at which memory is read: `size` bytes once, the best of `repeats`. None without the extension."""
    if not INSTRUCTION_SETS:
        return None
    best = min(alternate([reading(size)], 1)[0].median for _ in range(repeats))
    return size / best / 1e9


def reading(size: int) -> Callable[[], object]:
    """What reads `size` bytes of memory once, by the extension."""
    data = huge_memory(size).fill_(1)
    return lambda: native.stream(data)


@torch.no_grad()
def time_layer(
    out_features: int,
    in_features: int,
    pattern: NMPattern,
    dtype: torch.dtype,
    tokens: int,
    repeats: int = 20,
    working_set: int = 1 << 30,
    others: dict[str, Callable[[Tensor, Tensor], object]] | None = None,
    device: str | torch.device = "cpu",
    coding: Coding | None = None,
) -> LayerTiming:
    """Time X Wᵀ of `tokens` tokens with random weights, packed and dense in turn, a few calls each.

    Enough copies of the weight are gone through that each call finds its own in memory, not in a cache: `working_set`
    bytes of dense weight, as far as some hundreds of copies reach. The packed product is compared with the dense one
    before anything is timed.

    Args:
        out_features: Rows of the weight.
        in_features: Its columns.
        pattern: n kept of every m inputs, the largest.
        dtype: float32, float16 or bfloat16.
        tokens: Rows of X.
        repeats: Timed turns of each, of a few calls.
        working_set: Bytes of dense weight to go through.
        others: Further products to time, from x (tokens, in) and a dense weight (out, in), by name.
        device: Where.
        coding: Of the packed values, each rounded to the nearest; None for floats.

    Raises:
        NumericalError: packed and dense product differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    size = out_features * in_features * dtype.itemsize
    copies = max(2, min(_MOST_COPIES, -(-working_set // size)))
    weight = torch.randn(out_features, in_features, generator=generator).to(device, dtype)
    mask = topn_mask(weight.abs().float(), pattern)
    values, meta = pack(weight, mask, pattern)
    dense = [weight * mask for _ in range(copies)]
    x = torch.randn(tokens, in_features, generator=generator).to(device, dtype)
    del weight, mask
    product, parts, stored = _product(x, values, meta, pattern, coding)
    packed = [[part.clone() for part in parts] for _ in range(copies)]
    exact = coding is None or tokens > MOST_TOKENS_CODED
    _check(product(*packed[0]), x, unpack(stored, meta, pattern), None if exact else coding)

    def packed_product(i: int) -> Tensor:
        return product(*packed[i])

    choice = choose(dtype, x.device, tokens, in_features, pattern.n, pattern.m)
    if choice.backend in ("dense", "semi_structured"):  # which make what they hold at the first call
        for i in range(copies):
            packed_product(i)

    def through(product: Callable[[int], object]) -> Callable[[], object]:
        place = [0]

        def run() -> object:
            place[0] = (place[0] + 1) % copies
            return product(place[0])

        return run

    def through_dense(product: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        return through(lambda i: product(x, dense[i]))

    further = others or {}
    found = alternate(
        [
            through(packed_product),
            through_dense(torch.nn.functional.linear),
            *map(through_dense, further.values()),
        ],
        repeats,
        _CALLS,
        devices=[x.device],
    )
    read = size if choice.backend == "dense" else sum(part.nbytes for part in parts)
    return LayerTiming(
        out_features,
        in_features,
        str(pattern),
        str(dtype).removeprefix("torch."),
        tokens,
        choice.backend,
        choice.isa,
        found[0],
        found[1],
        found[1].median / found[0].median,
        read / found[0].median / 1e9,
        dict(zip(further, found[2:], strict=True)),
        None if coding is None else str(coding),
    )


def _product(
    x: Tensor, values: Tensor, meta: Tensor, pattern: NMPattern, coding: Coding | None
) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The packed product as a function of its weight's tensors, these, and the values that they stand for."""
    n, m = pattern.n, pattern.m
    if coding is None:
        return lambda values, meta: nm_linear(x, values, meta, None, n, m, True), [values, meta], values
    per_scale = coding.per_scale(pattern)
    scale = whole_range(values.float(), coding, per_scale)
    codes = store_codes(nearest_codes(values.float(), scale.float(), coding, per_scale), coding)
    stored = decode(codes, scale, values.shape[1], coding, per_scale, values.dtype)
    kind, group = coding.kind, coding.group

    def coded(codes: Tensor, scale: Tensor, meta: Tensor) -> Tensor:
        return coded_linear(x, codes, scale, meta, None, n, m, kind, group)

    return coded, [codes, scale, meta], stored


def _check(y: Tensor, x: Tensor, dense: Tensor, rounded: Coding | None = None) -> None:
    """Raise unless y is x Wᵀ up to rounding, of sums in float32, of the result, and of x where it is `rounded` so."""
    exact = x.double() @ dense.double().t()
    size = x.double().abs() @ dense.double().abs().t()
    bound = size * x.shape[1] * 2.0**-24 + exact.abs() * torch.finfo(y.dtype).eps / 2 + 1e-6
    if rounded is not None:
        wide = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % rounded.group))
        weights = torch.nn.functional.pad(dense.double().abs(), (0, -x.shape[1] % rounded.group))
        largest = wide.unflatten(1, (-1, rounded.group)).amax(2)
        bound += largest @ weights.unflatten(1, (-1, rounded.group)).sum(2).t() / 254 * 1.02  # of x as it is stored
    if not bool(((y.double() - exact).abs() <= bound).all()):
        raise NumericalError("the packed product differs from the dense one by more than rounding: please report this")
