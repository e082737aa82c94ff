"""
Range refinement: neighbouring stages move their common boundary by small steps from what they observe.

Theory. Stage s serves R_s decode tokens per second on k_s instances with n_s requests each and step time t_s; n_s = R_s t_s / k_s
(Little). Mean time per token is lowest when the requests in the system are fewest. Sending one more token per second at length b to
stage s adds

    price_s(b) = t_s * (1 + n_s * c_b / base)                     requests to the system,

where c_b is what one more request of length b adds to a step and `base` the step time of an empty batch: the request itself stays
t_s, and everybody there stays longer. (With t = base + c n and n = R t / k this is d(k n)/dR.) At the best boundary both
neighbours have the same price for a request at the boundary; the dearer side gives, so that the boundary moves away from it.
A stage that is nearly full is dearer still, whatever its step time: what waits for memory is in no batch.

Damping: the log of the price ratio is smoothed, a ratio inside the dead band moves nothing, one step changes the boundary by a few
per cent at most, and a boundary keeps its distance from its neighbours, so no range gets empty. Without a cost model the price is the
load: full is dear. Source: arXiv 2512.19179, section on adaptive range refinement; the price is ours.
"""

import math
from dataclasses import dataclass

from cascadeinfer.core.cost.latency import BatchFeatures, StepModel


@dataclass(frozen=True, slots=True)
class StageObservation:
    """
    What the instances of one stage see, averaged over them.

    Attributes:
        requests: Per instance.
        kv_tokens: Sum of their lengths, per instance.
        longest_tokens: The longest request of an instance.
        step_s: Step time; 0.0 when none has stepped.
        load: 1.0 is full, see `core/dispatch.py`.
    """

    requests: float
    kv_tokens: float
    longest_tokens: float
    step_s: float
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """
    How fast and how far boundaries move.

    Attributes:
        interval_s: Between two steps.
        smoothing: Weight of a new observation in the smoothed log price ratio.
        dead_band: Log price ratio that moves nothing.
        gain: Log boundary per log price ratio beyond the dead band.
        step_max: Largest change of the log of the boundary in one step.
        spacing: Least ratio between neighbouring boundaries.
        shortest_tokens: No boundary below this.
        full_load: Load from which a stage gets dearer beyond its step time.
    """

    interval_s: float = 2.0
    smoothing: float = 0.2
    dead_band: float = 0.2
    gain: float = 0.05
    step_max: float = 0.05
    spacing: float = 1.25
    shortest_tokens: int = 32
    full_load: float = 0.85


def price(seen: StageObservation, boundary_tokens: int, model: StepModel | None, settings: RefineSettings) -> float:
    """What one more token per second at this length costs in this stage; see the module header."""
    if model is None:
        return max(seen.load, 0.01)
    base_s = model.step_s(BatchFeatures(0, 0, 0))
    n = round(seen.requests)
    kv_tokens, longest = round(seen.kv_tokens), round(seen.longest_tokens)
    with_one = BatchFeatures(n + 1, kv_tokens + boundary_tokens, max(longest, boundary_tokens))
    without = BatchFeatures(n, kv_tokens, longest)
    added_s = max(0.0, model.step_s(with_one) - model.step_s(without))
    stay_s = max(seen.step_s, base_s)
    crowded = max(0.0, seen.load - settings.full_load) / max(1e-9, 1.0 - settings.full_load)
    return stay_s * (1.0 + seen.requests * added_s / base_s) * (1.0 + crowded * crowded)


class BoundaryRefiner:
    """One boundary. Keeps the smoothed log price ratio between steps."""

    def __init__(self, settings: RefineSettings, model: StepModel | None) -> None:
        self._settings = settings
        self._model = model
        self._ratio = 0.0

    def step(
        self,
        boundary_tokens: int,
        lower: StageObservation,
        upper: StageObservation,
        *,
        below_tokens: int,
        above_tokens: int | None,
    ) -> int:
        """
        Where the boundary should be now.

        Args:
            boundary_tokens: Where it is.
            lower: The stage below it.
            upper: The stage above it.
            below_tokens: The boundary below, 0 without one.
            above_tokens: The boundary above, None without one.

        Returns:
            The same, or a length a few per cent away, at its distance from the neighbours.
        """
        settings = self._settings
        dear = price(lower, boundary_tokens, self._model, settings)
        cheap = price(upper, boundary_tokens, self._model, settings)
        self._ratio += settings.smoothing * (math.log(dear / cheap) - self._ratio)
        excess = abs(self._ratio) - settings.dead_band
        if excess <= 0.0:
            return boundary_tokens
        change = -math.copysign(min(settings.step_max, settings.gain * excess), self._ratio)
        wanted = boundary_tokens * math.exp(change)
        moved = math.ceil(wanted) if change > 0.0 else math.floor(wanted)
        least = max(settings.shortest_tokens, math.ceil(below_tokens * settings.spacing))
        most = moved if above_tokens is None else math.floor(above_tokens / settings.spacing)
        if change > 0.0:
            return max(boundary_tokens, min(moved, most))
        return min(boundary_tokens, max(moved, least))
