"""
Steady state of one instance of a stage: the step time that its tokens see.

Each of the stage's k instances gets decode steps, KV reads and prefill work at constant rates. A token that waits t for
its step shares it with what arrives in t, so t solves `t = step_time(own share + rates * t)`; for a linear step model
the closed form is `t = (base + own) / (1 - work / k)`. With Poisson arrivals and processor sharing it is exact,
fluctuations of the batch included (generalised processor sharing, Cohen 1979: insensitive to the distribution of
lengths). `own` is the token's own work, which shrinks as 1/k when the least loaded instance takes each arrival, because
then the batch hardly fluctuates.

Prefills come in chunks rather than as a trickle: a step holds a chunk with probability (prefill tokens per step) /
chunk, which matters where tokens below a knee are free; decodes and chunk fill no more than the token budget. The
straggler term needs the longest length of a batch: the average over quantiles of the maximum of `batch` draws from the
stage's residence, by length.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.cost.latency import decode_attention_s, step_time_s

_QUANTILES: Final = (1.0 / 6.0, 0.5, 5.0 / 6.0)
"""Quantiles of the longest length in a batch; each represents a third of the steps."""
_DOUBLINGS: Final = 12
"""Quantiles are computed for batches of 1, 2, 4 ... 4096 and interpolated between them."""
_MAX_ITERATIONS: Final = 20
_TOLERANCE: Final = 1e-5


class StageLoad(NamedTuple):
    """A range of buckets [i, j) as seen by one of its k instances; sums are per request of the whole workload."""

    i: int
    j: int
    n_instances: float
    rate: float  # requests per second and instance
    steps: float
    kv_steps: float
    starts: float
    prompt: float
    attention: float
    chunk: float  # prompt tokens in a step that has any, when prompts rarely meet
    prefill_load: float  # share of time in prefill at constant decode cost
    budget: float  # tokens of a step


@njit(cache=True, error_model="numpy")
def _length_at(table: NDArray[np.float64], edges: NDArray[np.float64], i: int, j: int, share: float) -> float:
    """Length below which this share of the decode steps in buckets [i, j) lies, interpolated."""
    target = table[Column.STEPS, i] + share * (table[Column.STEPS, j] - table[Column.STEPS, i])
    lo = i
    hi = j
    while hi - lo > 1:
        mid = (lo + hi) // 2
        if table[Column.STEPS, mid] <= target:
            lo = mid
        else:
            hi = mid
    width = table[Column.STEPS, hi] - table[Column.STEPS, lo]
    inside = (target - table[Column.STEPS, lo]) / width if width > 0.0 else 1.0
    return edges[lo] + inside * (edges[hi] - edges[lo])


@njit(cache=True, error_model="numpy")
def longest_in_batch(
    table: NDArray[np.float64], edges: NDArray[np.float64], i: int, j: int, coefficients: NDArray[np.float64]
) -> NDArray[np.float64]:
    """
    Quantiles of the longest length in batches of 1, 2, 4 ... requests of the stage's mix.

    Returns:
        Row m for 2^m requests; no rows when the step model has no straggler term.
            # (_DOUBLINGS + 1 or 0, len(_QUANTILES))
    """
    if coefficients[5] == 0.0 or table[Column.STEPS, j] <= table[Column.STEPS, i]:
        return np.empty((0, len(_QUANTILES)))
    longest = np.empty((_DOUBLINGS + 1, len(_QUANTILES)))
    for q in range(len(_QUANTILES)):
        share = _QUANTILES[q]
        for m in range(_DOUBLINGS + 1):
            longest[m, q] = _length_at(table, edges, i, j, share)
            share = np.sqrt(share)  # quantile of the maximum of twice as many draws
    return longest


@njit(cache=True, error_model="numpy")
def _longest_of(longest: NDArray[np.float64], stage: StageLoad, batch: float, q: int) -> float:
    """Quantile `q` of the longest length in a batch of the stage's mix; the mean without `longest_in_batch`'s rows."""
    mean_length = stage.kv_steps / stage.steps
    if len(longest) == 0:
        return mean_length
    doublings = min(max(0.0, np.log2(batch)), _DOUBLINGS - 1e-9)
    m = int(doublings)
    kv_max = longest[m, q] + (doublings - m) * (longest[m + 1, q] - longest[m, q])
    return min(max(mean_length, kv_max), batch * mean_length)


@njit(cache=True, error_model="numpy")
def decode_step_s(
    coefficients: NDArray[np.float64], longest: NDArray[np.float64], stage: StageLoad, batch: float
) -> float:
    """Step time of a batch of the stage's own mix without prefills, averaged over the possible longest members."""
    if stage.steps <= 0.0:
        return step_time_s(coefficients, 0.0, 0.0, 0.0, 0.0, 0.0)
    mean_length = stage.kv_steps / stage.steps
    if len(longest) == 0:
        return step_time_s(coefficients, batch, batch * mean_length, mean_length, 0.0, 0.0)
    total = 0.0
    for q in range(len(_QUANTILES)):
        kv_max = _longest_of(longest, stage, batch, q)
        total += step_time_s(coefficients, batch, batch * mean_length, kv_max, 0.0, 0.0)
    return total / len(_QUANTILES)


@njit(cache=True, error_model="numpy")
def _beside_chunk_s(
    coefficients: NDArray[np.float64], longest: NDArray[np.float64], stage: StageLoad, batch: float, chunk: float
) -> float:
    """Seconds that the decodes' attention takes longer (or less) beside a chunk of the stage's prompts than alone."""
    if stage.steps <= 0.0 or stage.prompt <= 0.0:
        return 0.0
    if batch + chunk <= coefficients[20] and coefficients[24] == 0.0:
        return 0.0
    kv_tokens = batch * stage.kv_steps / stage.steps
    pairs = chunk * stage.attention / stage.prompt
    total = 0.0
    for q in range(len(_QUANTILES)):
        kv_max = _longest_of(longest, stage, batch, q)
        total += decode_attention_s(coefficients, batch, kv_tokens, kv_max, chunk, pairs)
        total -= decode_attention_s(coefficients, batch, kv_tokens, kv_max, 0.0, 0.0)
    return total / len(_QUANTILES)


@njit(cache=True, error_model="numpy")
def prefill_per_token_s(coefficients: NDArray[np.float64], batch: float, chunk: float) -> float:
    """Seconds that each token of a chunk adds to a step that decodes `batch` short requests; excludes attention."""
    # The same short decodes in both terms, so that only the chunk makes a difference.
    with_chunk = step_time_s(coefficients, batch, batch, 1.0, chunk, 0.0)
    return (with_chunk - step_time_s(coefficients, batch, batch, 1.0, 0.0, 0.0)) / chunk


@njit(cache=True, error_model="numpy")
def chunk_per_token_s(
    coefficients: NDArray[np.float64], longest: NDArray[np.float64], stage: StageLoad, batch: float, chunk: float
) -> float:
    """
    Seconds that each token of a chunk adds to a step of `batch` requests of the stage's mix: its dense layers', and its
    part of what their attention takes longer beside the chunk; excludes its own attention.
    """
    beside_s = _beside_chunk_s(coefficients, longest, stage, batch, chunk)
    return prefill_per_token_s(coefficients, batch, chunk) + beside_s / chunk


@njit(cache=True, error_model="numpy")
def meets_decode(present: float, n_instances: float) -> float:
    """
    Probability that an arrival at a busy instance found no idle one, with `present` requests per instance.

    An instance is empty with probability exp(-present) when arrivals are spread blindly; the least loaded rule makes
    that exp(-present (1 + present)). The probability that all others are busy follows Sakasegawa's exponent.
    """
    exponent = np.sqrt(2.0 * (n_instances + 1.0)) - 2.0
    if present * (1.0 + present) > 18.0 + np.log(1.0 + exponent):
        return 1.0  # to 1 part in 10^7
    return (1.0 - np.exp(-present * (1.0 + present))) ** exponent


@njit(cache=True, error_model="numpy")
def _step_seen_s(
    coefficients: NDArray[np.float64],
    longest: NDArray[np.float64],
    stage: StageLoad,
    t: float,
) -> float:
    """Step time a token sees when the batch has gathered for `t` seconds: the right-hand side of the fixed point."""
    others = stage.rate * stage.steps * t
    batch = max(1.0, others + 1.0 / stage.n_instances)
    arriving = stage.rate * t * meets_decode(others + stage.prefill_load, stage.n_instances)
    seen_s = decode_step_s(coefficients, longest, stage, batch)
    tokens = arriving * stage.prompt
    if tokens > 0.0:
        chunk = min(stage.chunk + tokens, max(1.0, stage.budget - others))
        seen_s += tokens * chunk_per_token_s(coefficients, longest, stage, batch, chunk)
        seen_s += arriving * stage.attention * coefficients[4]
    return seen_s


@njit(cache=True, error_model="numpy")
def solve_step_s(
    coefficients: NDArray[np.float64],
    longest: NDArray[np.float64],
    stage: StageLoad,
    t_max: float,
) -> float:
    """Root of `step_seen(t) = t` in (0, t_max], by Illinois regula falsi; infinite when there is none."""
    high = t_max
    g_high = _step_seen_s(coefficients, longest, stage, t_max) - t_max
    if g_high > 0.0:
        return np.inf
    # The right-hand side grows with t, so the root is at least its value at 0 and, by the same argument, its value
    # there.
    low = min(_step_seen_s(coefficients, longest, stage, 0.0), t_max)
    g_low = _step_seen_s(coefficients, longest, stage, low) - low
    if g_low <= _TOLERANCE * low:
        return low
    side = 0
    t = low
    for _ in range(_MAX_ITERATIONS):
        t = low + g_low * (high - low) / (g_low - g_high)
        g = _step_seen_s(coefficients, longest, stage, t) - t
        if abs(g) <= _TOLERANCE * t:
            break
        if g > 0.0:
            low = t
            g_low = g
            if side == 1:
                g_high *= 0.5
            side = 1
        else:
            high = t
            g_high = g
            if side == -1:
                g_low *= 0.5
            side = -1
    return t
