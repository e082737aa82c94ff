"""
The highest rate at which a policy still keeps an SLO.

Bisection over the logarithm of the rate, on the share of requests that kept it, averaged over seeds. The share falls with the rate but for
noise; the answer is where the search found it to hold, never a rate that was not run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HighestRate:
    """
    Attributes:
        rate_rps: The highest rate found that keeps the SLO; 0 when not even the lowest tried does.
        limited: Whether the highest rate tried failed; else the policy may be able to do more.
        tried: Every rate that was run, with the share of requests that kept the SLO.
    """

    rate_rps: float
    limited: bool
    tried: tuple[tuple[float, float], ...]


def highest_rate(
    attainment_at: Callable[[float], float], low_rps: float, high_rps: float, share: float, steps: int
) -> HighestRate:
    """
    Search between two rates.

    Args:
        attainment_at: Share of requests within the SLO at a rate.
        low_rps: Lowest rate tried, > 0.
        high_rps: Highest rate tried, > `low_rps`.
        share: What has to be kept.
        steps: Bisections after the two ends; each halves the interval's ratio in the logarithm.
    """
    tried: list[tuple[float, float]] = []

    def keeps(rate_rps: float) -> bool:
        tried.append((rate_rps, attainment_at(rate_rps)))
        return tried[-1][1] >= share

    if not keeps(low_rps):
        return HighestRate(0.0, limited=True, tried=tuple(tried))
    if keeps(high_rps):
        return HighestRate(high_rps, limited=False, tried=tuple(tried))
    good, bad = low_rps, high_rps
    for _ in range(steps):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if keeps(middle) else (good, middle)
    return HighestRate(good, limited=True, tried=tuple(tried))
