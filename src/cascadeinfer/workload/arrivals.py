"""
Arrival processes: times of `n` requests in seconds, non-decreasing, drawn exactly (no gap is ever clamped or rounded).

Each takes its generator. The first request comes after the first gap. A recorded trace is its own arrival process: use
`Trace.at_rate` to replay it at another speed.
"""

import math

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.errors import TraceError


def poisson_arrivals(rate_rps: float, n: int, rng: np.random.Generator) -> NDArray[np.float64]:  # (n,)
    """Independent users: exponential gaps with mean 1 / rate."""
    _positive(rate_rps=rate_rps)
    return np.cumsum(rng.exponential(1.0 / rate_rps, size=n))


def gamma_arrivals(rate_rps: float, cv: float, n: int, rng: np.random.Generator) -> NDArray[np.float64]:  # (n,)
    """
    Gamma gaps: bursty for a coefficient of variation above 1, regular below 1, Poisson at 1.

    Shape k = 1 / cv^2 and scale cv^2 / rate give mean 1 / rate and standard deviation cv / rate.
    """
    _positive(rate_rps=rate_rps, cv=cv)
    return np.cumsum(rng.gamma(1.0 / cv**2, cv**2 / rate_rps, size=n))


def renewal_window(
    law: str, shape: float, rate_rps: float, duration_s: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """
    A stationary renewal process seen through a window: arrival times in `[0, duration_s)`.

    The first arrival is the residual of a length-biased gap, so the expected count is exactly `rate_rps * duration_s`,
    whatever the gaps' law.

    Args:
        law: Law of the gaps: `gamma` or `weibull`.
        shape: Shape of that law; 1 is Poisson for both.
        rate_rps: Mean rate.
        duration_s: Length of the window.
        rng: Source of randomness.
    """
    _positive(shape=shape, rate_rps=rate_rps, duration_s=duration_s)
    if law == "gamma":
        scale_s = 1.0 / (rate_rps * shape)
        covering_s = rng.gamma(shape + 1.0, scale_s)
    elif law == "weibull":
        scale_s = 1.0 / (rate_rps * math.gamma(1.0 + 1.0 / shape))
        covering_s = scale_s * rng.gamma(1.0 + 1.0 / shape, 1.0) ** (1.0 / shape)
    else:
        raise TraceError(f"unknown law of gaps {law!r}: gamma or weibull")
    next_s = float(rng.random() * covering_s)
    times: list[NDArray[np.float64]] = []
    chunk = max(16, int(rate_rps * duration_s * 1.1))
    while next_s < duration_s:
        gaps = rng.gamma(shape, scale_s, chunk) if law == "gamma" else scale_s * rng.weibull(shape, chunk)
        block = next_s + np.concatenate(([0.0], np.cumsum(gaps)))
        times.append(block[:-1])
        next_s = float(block[-1])
    drawn = np.concatenate(times) if times else np.zeros(0)
    return drawn[drawn < duration_s]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0.0):
            raise TraceError(f"{name} must be positive, not {value}")
