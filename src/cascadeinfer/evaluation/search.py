"""
The highest rate at which a policy still keeps an SLO.

Bisection over the logarithm of the rate, on the share of requests that keep the SLO, averaged over seeds. Apart from
noise, this share falls with the rate. The answer is always a rate that was run and found to hold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HighestRate:
    """
    The result of the search.

    Attributes:
        rate_rps: The highest rate found that keeps the SLO; 0 if even the lowest one tried does not.
        limited: Whether the highest rate tried failed; otherwise the policy may sustain more.
        tried: Every rate that was run, with the share of requests that kept the SLO.
        failed_rps: The lowest rate tried that failed; None if none did. The limit lies between the two.
    """

    rate_rps: float
    limited: bool
    tried: tuple[tuple[float, float], ...]
    failed_rps: float | None = None


def highest_rate(
    attainment_at: Callable[[float], float], low_rps: float, high_rps: float, share: float, steps: int
) -> HighestRate:
    """
    Search between two rates.

    Args:
        attainment_at: Returns the share of requests within the SLO at a rate.
        low_rps: Lowest rate tried, > 0.
        high_rps: Highest rate tried, > `low_rps`.
        share: The share that must be attained.
        steps: Bisections after the two ends have been tried; each halves the interval on the logarithmic scale.
    """
    tried: list[tuple[float, float]] = []

    def keeps(rate_rps: float) -> bool:
        tried.append((rate_rps, attainment_at(rate_rps)))
        return tried[-1][1] >= share

    if not keeps(low_rps):
        return HighestRate(0.0, limited=True, tried=tuple(tried), failed_rps=low_rps)
    if keeps(high_rps):
        return HighestRate(high_rps, limited=False, tried=tuple(tried))
    good, bad = low_rps, high_rps
    for _ in range(steps):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if keeps(middle) else (good, middle)
    return HighestRate(good, limited=True, tried=tuple(tried), failed_rps=bad)
