"""The requests of a run from a trace: lengths drawn with arrivals from a law, or a stretch of the trace as recorded."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.workload.arrivals import gamma_arrivals, poisson_arrivals
from cascadeinfer.workload.trace import Trace


@dataclass(frozen=True, slots=True)
class ArrivalLaw:
    """
    When requests arrive.

    Attributes:
        kind: `poisson`; `gamma`, gaps with the coefficient of variation `cv`; `recorded`, a stretch of the trace with
            its own times, lengths and order, scaled to the rate.
        cv: Coefficient of variation of gamma gaps, > 0.
    """

    kind: Literal["poisson", "gamma", "recorded"] = "poisson"
    cv: float = 1.0


def draw_requests(
    trace: Trace, law: ArrivalLaw, requests: int, rate_rps: float | None, rng: np.random.Generator
) -> Trace:
    """
    The given number of requests at this rate; a function of its arguments.

    Args:
        trace: The trace to draw from.
        law: When requests arrive.
        requests: Number of requests.
        rate_rps: Their mean rate; None for that of a recorded stretch.
        rng: Source of randomness.

    Raises:
        ConfigError: Recorded arrivals are wanted and the trace has none, or too few; or a law has no rate.
    """
    if law.kind == "recorded":
        return _stretch(trace, requests, rate_rps, rng)
    if rate_rps is None:
        raise ConfigError(f"{law.kind} arrivals need a rate", option="--rate", fix="requests per second")
    lengths = trace.resample(requests, rng)
    if law.kind == "gamma":
        return lengths.with_arrivals(gamma_arrivals(rate_rps, law.cv, requests, rng))
    return lengths.with_arrivals(poisson_arrivals(rate_rps, requests, rng))


def _stretch(trace: Trace, requests: int, rate_rps: float | None, rng: np.random.Generator) -> Trace:
    """Consecutive requests from a place in the trace chosen by the seed; times are scaled by the trace's mean rate."""
    if not trace.has_arrivals:
        raise ConfigError("the trace has no arrival times", option="--arrivals", fix="poisson, or gamma:CV")
    if requests > len(trace):
        raise ConfigError(
            f"{requests} recorded requests are wanted, the trace has {len(trace)}",
            option="--arrivals",
            fix=f"--requests {len(trace)} at most, or --arrivals poisson",
        )
    first = int(rng.integers(len(trace) - requests + 1))
    paced = trace if rate_rps is None else trace.at_rate(rate_rps)
    part = paced.rows(np.arange(first, first + requests))
    return part.with_arrivals(part.arrival_s - part.arrival_s[0])
