"""
Length distributions: prompt or output lengths in tokens, whole numbers of at least 1, drawn exactly.

A draw from a continuous law is rounded up, so that P(length <= k) is that law's distribution function at k: no clamp,
no bias towards a bound. Real traces are better than any of these (`Trace.resample`); these are for worked examples and
sensitivity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.errors import TraceError


class LengthDistribution(Protocol):
    """A distribution that lengths can be drawn from."""

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:  # (n,)
        """`n` independent lengths in tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        """Refuse an empty sequence."""
        if self.tokens < 1:
            raise TraceError(f"a length must be at least 1 token, not {self.tokens}")

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:  # noqa: ARG002 - nothing to draw
        """See `LengthDistribution.draw`."""
        return np.full(n, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Empirical:
    """Lengths seen before, drawn with replacement; `weights` (not normalised) are equal by default."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Refuse empty samples, lengths below 1 and weights that are not a law."""
        if not len(self.tokens) or int(self.tokens.min()) < 1:
            raise TraceError("an empirical distribution needs lengths of at least 1 token")
        weights = self.weights
        if weights is not None and (
            len(weights) != len(self.tokens)
            or not np.isfinite(weights).all()
            or float(weights.min()) < 0.0
            or float(weights.sum()) <= 0.0
        ):
            raise TraceError("weights must be finite, not negative, and one per length")

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:  # (n,)
        """See `LengthDistribution.draw`."""
        probabilities = None if self.weights is None else self.weights / self.weights.sum()
        return rng.choice(self.tokens, size=n, p=probabilities).astype(np.int64)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """
    The shape that most length traces have.

    Attributes:
        median_tokens: exp(mu).
        sigma: Standard deviation of the logarithm.
    """

    median_tokens: float
    sigma: float

    def __post_init__(self) -> None:
        """Refuse what is not a law."""
        if not (math.isfinite(self.median_tokens) and self.median_tokens > 0.0):
            raise TraceError(f"the median must be positive, not {self.median_tokens}")
        if not (math.isfinite(self.sigma) and self.sigma >= 0.0):
            raise TraceError(f"sigma must not be negative, not {self.sigma}")

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:  # (n,)
        """See `LengthDistribution.draw`."""
        return np.ceil(rng.lognormal(math.log(self.median_tokens), self.sigma, size=n)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Mixture:
    """One of several distributions per draw, with these weights (not normalised)."""

    parts: Sequence[LengthDistribution]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        """Refuse weights that are not a law."""
        if len(self.parts) != len(self.weights) or not self.parts:
            raise TraceError("a mixture needs one weight per part")
        if min(self.weights) < 0.0 or not math.isfinite(sum(self.weights)) or sum(self.weights) <= 0.0:
            raise TraceError(f"weights must be finite and not negative, not {tuple(self.weights)}")

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:  # (n,)
        """See `LengthDistribution.draw`."""
        weights = np.asarray(self.weights, dtype=np.float64)
        part_of = rng.choice(len(self.parts), size=n, p=weights / weights.sum())
        drawn = np.empty(n, dtype=np.int64)
        for index, part in enumerate(self.parts):
            mine = np.flatnonzero(part_of == index)
            drawn[mine] = part.draw(len(mine), rng)
        return drawn
