"""The N:M pattern: how many of every m consecutive inputs a row keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ConfigError

GROUP_SIZES = (2, 4, 8, 16, 32)
"""The values of m that the packed format knows."""


@dataclass(frozen=True, order=True)
class NMPattern:
    """Keep `n` of every `m` consecutive inputs, in every row. `n` is the number **kept**.

    Args:
        n: Number kept in a group, `1 <= n < m`.
        m: Group size, one of 2, 4, 8, 16, 32.

    Raises:
        ConfigError: `n` or `m` is not an integer in its range.

    >>> NMPattern(n=2, m=4)
    NMPattern(n=2, m=4)
    >>> str(NMPattern.parse("6:8")), NMPattern.parse("6:8").density
    ('6:8', 0.75)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"pattern: {name}={value!r} is not an integer; write for example NMPattern(n=2, m=4)")
        if self.m not in GROUP_SIZES:
            raise ConfigError(
                f"pattern {self.n}:{self.m}: m={self.m} is not a supported group size; use one of {list(GROUP_SIZES)}"
            )
        if not 1 <= self.n < self.m:
            raise ConfigError(
                f"pattern {self.n}:{self.m}: n={self.n} is the number kept of every m={self.m} and must be between 1 "
                f"and {self.m - 1}; write for example 2:4"
            )

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """Read `"n:m"`, with n the number kept.

        Raises:
            ConfigError: `text` is not two integers with a colon between, or they are out of range.
        """
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"pattern={text!r} is not of the form 'n:m' (n kept of every m); write for example '2:4'")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"
