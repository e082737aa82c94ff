"""The law of prompt or output lengths in tokens, as a published histogram of them gives it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.errors import TraceError


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
        """`n` independent lengths in tokens."""
        probabilities = None if self.weights is None else self.weights / self.weights.sum()
        return rng.choice(self.tokens, size=n, p=probabilities).astype(np.int64)
