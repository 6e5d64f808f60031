"""Two models on the same windows: what differs, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .reading import Reading

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its interval of 95 % confidence; the ends are None where there is one window only."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """The first of two models against the second.

    Attributes:
        nats_difference: Mean negative log-likelihood a token of the first, less that of the second.
        perplexity_ratio: Perplexity of the first over that of the second.
        kl_divergence: KL(second ‖ first), nats a token.
        top1_agreement: Share of tokens of which both call the same next one the most likely.
    """

    nats_difference: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    top1_agreement: Estimate


def compare(reading: Reading) -> Comparison:
    """Compare the two models of a reading. Windows are taken as independent draws, each weighing as it has tokens."""
    assert reading.divergence is not None
    assert reading.agreement is not None
    difference = estimate(reading.nats[0] - reading.nats[1], reading.tokens)
    low, high = (None if end is None else math.exp(min(end, 700.0)) for end in (difference.low, difference.high))
    return Comparison(
        difference,
        Estimate(math.exp(min(difference.value, 700.0)), low, high),
        estimate(reading.divergence, reading.tokens),
        estimate(reading.agreement, reading.tokens),
    )


def estimate(sums: Tensor, tokens: Tensor) -> Estimate:
    """The mean over tokens of what `sums` (windows,) adds up over `tokens` (windows,), with its interval.

    The ratio estimator of cluster sampling (Cochran, Sampling Techniques, 1977, section 9A): the standard error comes
    from the windows' deviations from the mean, and the interval from Student's t with windows - 1 degrees of freedom.

    >>> import torch
    >>> found = estimate(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
    >>> found.value, round(found.high - found.value, 3)
    (2.0, 12.706)
    """
    from scipy.stats import t

    total, count = float(tokens.sum()), len(sums)
    mean = float(sums.sum()) / total
    if count < 2:
        return Estimate(mean, None, None)
    deviations = (sums.double() - mean * tokens.double()) / total
    error = math.sqrt(float(deviations.square().sum()) * count / (count - 1))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(mean, mean - reach, mean + reach)
