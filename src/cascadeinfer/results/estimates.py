"""
Metrics of runs on live servers, each with its 95 % confidence interval, for all requests and for short and long ones.

Within one run requests are not independent: concurrent ones wait for each other. The interval of one run is therefore a
moving-block bootstrap over the requests in order of arrival, with blocks at least as long as the number of concurrent
requests. The rates of one run have no interval: they are what the load generator offered, divided by one span of time.
Over several runs of one label the interval is Student's t on the runs' values, as for the simulator's seeds. Two labels
are compared run by run (ratios of runs with the same number), because runs taken one after the other saw the same
machine; below `LEAST_PAIRS` pairs nothing can be told.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cascadeinfer.results.records import RequestRecords
from cascadeinfer.results.summary import Slo

LATENCIES: Final = ("ttft_s", "tpot_s", "normalised_latency_s", "e2e_s")
GROUPS: Final = ("all", "short", "long")
RATES: Final = ("throughput_rps", "throughput_tokens_per_s", "goodput_rps", "slo_attainment")
PER_SECOND: Final = ("throughput_rps", "throughput_tokens_per_s", "goodput_rps")
LEAST_PAIRS: Final = 3
"""Student's t on two pairs is 12.7 standard errors wide: it says nothing, and looks as if it did."""
DRAWS: Final = 1000
LONG_OVER_MEDIAN: Final = 4.0
"""By default, a request is long from this multiple of the median length on."""


def percentile_of_rows(values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """
    Like `np.nanpercentile` along the last axis, which takes a Python step per row.

    Args:
        values: Each row with at least one number; NaN is ignored.
        share: In [0, 1].
    """
    ordered = np.sort(values, axis=-1)  # NaN is sorted to the end
    place = share * (np.count_nonzero(~np.isnan(ordered), axis=-1, keepdims=True) - 1)
    below = np.floor(place).astype(np.int64)
    low = np.take_along_axis(ordered, below, axis=-1)
    high = np.take_along_axis(ordered, np.ceil(place).astype(np.int64), axis=-1)
    result: NDArray[np.float64] = (low + (place - below) * (high - low))[..., 0]
    return result


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]

STATISTICS: Final[dict[str, Statistic]] = {
    "mean": lambda values: np.nanmean(values, axis=-1),
    "p50": lambda values: percentile_of_rows(values, 0.50),
    "p99": lambda values: percentile_of_rows(values, 0.99),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; the ends are NaN where there is too little data."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """
    One run's metrics of a group of requests.

    Attributes:
        requests: Number of requests counted.
        failed: Those refused, broken off, incomplete or timed out; every one missed the SLO.
        figures: By name: `ttft_s_mean`, `e2e_s_p99`, `goodput_rps`, ...
    """

    requests: int
    failed: int
    figures: dict[str, Estimate]


def long_from_tokens(records: RequestRecords) -> int:
    """Default of the total length from which a request is long."""
    return int(np.ceil(LONG_OVER_MEDIAN * float(np.median(records.prompt_tokens + records.output_tokens))))


def groups_of(records: RequestRecords, long_tokens: int) -> dict[str, NDArray[np.bool_]]:
    """Which rows are in each group; groups without requests are left out."""
    is_long = records.prompt_tokens + records.output_tokens >= long_tokens
    groups = {"all": np.ones(len(records), dtype=np.bool_), "short": ~is_long, "long": is_long}
    return {name: rows for name, rows in groups.items() if rows.any()}


def counted_rows(records: RequestRecords, warm_up: float) -> RequestRecords:
    """The records without the first share of the requests, during which the server fills."""
    return records.rows(np.arange(int(warm_up * len(records)), len(records)))


def errors_by_kind(errors: Sequence[str]) -> dict[str, int]:
    """How often each kind of error occurred, most frequent first."""
    return dict(Counter(error.partition(":")[0] for error in errors if error).most_common())


def summarise_groups(
    records: RequestRecords, slo: Slo, long_tokens: int, rng: np.random.Generator
) -> dict[str, GroupSummary]:
    """
    Metrics of one run, group by group.

    Args:
        records: The counted requests, in order of arrival.
        slo: What counts as good.
        long_tokens: Total length from which a request is long.
        rng: For the bootstrap.

    Raises:
        ValueError: There is no request.
    """
    if not len(records):
        raise ValueError("a summary needs requests")
    span_s = _span_s(records)
    return {
        name: _summarise(records.rows(rows), span_s, slo, rng) for name, rows in groups_of(records, long_tokens).items()
    }


def _span_s(records: RequestRecords) -> float:
    """Seconds from the first arrival to the last token of any request, or to the last arrival if that is later."""
    ends = [float(np.nanmax(records.finish_s))] if records.finished.any() else []
    return max([*ends, float(records.arrival_s[-1])]) - float(records.arrival_s[0])


def _summarise(records: RequestRecords, span_s: float, slo: Slo, rng: np.random.Generator) -> GroupSummary:
    n = len(records)
    draws = block_draws(n, _block_length(records), rng)
    figures = {}
    for field in LATENCIES:
        values = getattr(records, field)
        for name, statistic in STATISTICS.items():
            figures[f"{field}_{name}"] = _latency(values, statistic, draws)
    good = records.finished & (records.ttft_s <= slo.ttft_s) & ~(records.tpot_s > slo.tpot_s)
    rate = n / span_s if span_s > 0.0 else np.nan
    per_request = {
        "throughput_rps": rate * records.finished,
        "throughput_tokens_per_s": rate * records.produced_tokens,
        "goodput_rps": rate * good,
        "slo_attainment": good,
    }
    for field, values in per_request.items():
        drawn = None if field in PER_SECOND else draws
        figures[field] = _latency(np.asarray(values, dtype=np.float64), STATISTICS["mean"], drawn)
    return GroupSummary(n, int(np.count_nonzero(~records.finished)), figures)


def _latency(values: NDArray[np.float64], statistic: Statistic, draws: NDArray[np.int64] | None) -> Estimate:
    """A statistic of the finite values, with its bootstrap interval."""
    if not np.isfinite(values).any():
        return Estimate(np.nan, np.nan, np.nan)
    value = float(statistic(values))
    if draws is None:
        return Estimate(value, np.nan, np.nan)
    drawn = values[draws]
    drawn = drawn[np.isfinite(drawn).any(axis=1)]
    low, high = np.percentile(statistic(drawn), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def _block_length(records: RequestRecords) -> int:
    """Number of concurrent requests, at least the cube root of their total."""
    n = len(records)
    span_s = float(records.arrival_s[-1] - records.arrival_s[0])
    stay_s = float(np.nanmean(records.e2e_s)) if records.finished.any() else 0.0
    together = n * stay_s / span_s if span_s > 0.0 else 1.0
    return max(1, round(float(np.cbrt(n))), int(np.ceil(together)))


def block_draws(n: int, block: int, rng: np.random.Generator) -> NDArray[np.int64] | None:  # (DRAWS, n)
    """Rows of each bootstrap sample: blocks of neighbours, cyclic; None when there are fewer than four blocks."""
    if n < 4 * block:
        return None
    n_blocks = -(-n // block)
    starts = rng.integers(0, n, (DRAWS, n_blocks, 1))
    rows: NDArray[np.int64] = ((starts + np.arange(block)) % n).reshape(DRAWS, -1)[:, :n]
    return rows


def over_runs(runs: Sequence[Estimate]) -> Estimate:
    """Of one run, its own interval; of several, mean and Student's t interval over the runs' values."""
    if len(runs) == 1:
        return runs[0]
    return _t_interval([run.value for run in runs])


def ratio_over_runs(runs: Sequence[Estimate], reference: Sequence[Estimate]) -> Estimate:
    """
    Ratio to the reference, run by run: geometric mean, with Student's t interval on the logarithms.

    Runs without a partner are left out. Below `LEAST_PAIRS` pairs there is no interval.
    """
    pairs = [
        (mine.value, other.value) for mine, other in zip(runs, reference, strict=False) if mine.value > 0 < other.value
    ]
    if not pairs:
        return Estimate(np.nan, np.nan, np.nan)
    logarithms = [float(np.log(mine / other)) for mine, other in pairs]
    if len(logarithms) < LEAST_PAIRS:
        return Estimate(float(np.exp(np.mean(logarithms))), np.nan, np.nan)
    spread = _t_interval(logarithms)
    return Estimate(float(np.exp(spread.value)), float(np.exp(spread.low)), float(np.exp(spread.high)))


def _t_interval(values: Sequence[float]) -> Estimate:
    column = np.asarray(values, dtype=np.float64)
    column = column[np.isfinite(column)]
    if not len(column):
        return Estimate(np.nan, np.nan, np.nan)
    mean = float(column.mean())
    if len(column) < 2:
        return Estimate(mean, np.nan, np.nan)
    half = float(stats.t.ppf(0.975, len(column) - 1)) * float(column.std(ddof=1)) / float(np.sqrt(len(column)))
    return Estimate(mean, mean - half, mean + half)


def by_group(summaries: Sequence[Mapping[str, GroupSummary]], group: str) -> list[GroupSummary]:
    """The runs' summaries of one group, where they have it."""
    return [summary[group] for summary in summaries if group in summary]
