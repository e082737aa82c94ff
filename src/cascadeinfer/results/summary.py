"""
From records to metrics: means with confidence intervals, percentiles, throughput, SLO attainment and goodput.

Only finished requests have latencies; rejected and unfinished ones are counted, and count as a miss of every SLO. The
interval over several seeds is Student's t on the seeds' means, because requests of one run are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy import stats

from cascadeinfer.results.records import RequestRecords

SHORT_RUN: Final = 3.0
"""A run shorter than this many mean latencies hardly ever reaches its steady state."""


@dataclass(frozen=True, slots=True)
class Slo:
    """
    What a request must keep to count as good.

    Attributes:
        ttft_s: Longest time to the first token.
        tpot_s: Longest time per output token after it.
    """

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class RunSummary:
    """
    Metrics of one run; seconds, requests per second and tokens per second.

    Attributes:
        unfinished: Requests that were rejected, aborted or still in progress at the end.
        slo_attainment: Share of all requests that kept the SLO.
        goodput_rps: Requests that kept the SLO, per second of the run.
        shared: Dispatches to another place than the stage's because of a backlog; only the simulator counts them here.
    """

    requests: int
    unfinished: int
    ttft_s_mean: float
    ttft_s_p99: float
    tpot_s_mean: float
    tpot_s_p99: float
    normalised_latency_s_mean: float
    normalised_latency_s_p99: float
    e2e_s_mean: float
    e2e_s_p50: float
    e2e_s_p99: float
    throughput_rps: float
    throughput_tokens_per_s: float
    slo_attainment: float
    goodput_rps: float
    migrations: int
    preemptions: int
    shared: int = 0


def is_short(span_s: float, run: RunSummary) -> bool:
    """Whether a run in which requests came for this long was too short for its cluster to fill."""
    return span_s < SHORT_RUN * run.e2e_s_mean


def summarise(records: RequestRecords, duration_s: float, slo: Slo) -> RunSummary:
    """
    Metrics of one run.

    Args:
        records: Its requests.
        duration_s: Duration of the run, for the rates; > 0.
        slo: What counts as good.

    Raises:
        ValueError: The duration is not positive, or there is no request.
    """
    if not duration_s > 0.0 or not len(records):
        raise ValueError("a summary needs requests and a positive duration")
    done = records.rows(records.finished)
    kept = (done.ttft_s <= slo.ttft_s) & ~(done.tpot_s > slo.tpot_s)  # one-token outputs have no TPOT
    n_kept = int(np.count_nonzero(kept))
    return RunSummary(
        requests=len(records),
        unfinished=len(records) - len(done),
        ttft_s_mean=_mean(done.ttft_s),
        ttft_s_p99=_percentile(done.ttft_s, 99),
        tpot_s_mean=_mean(done.tpot_s),
        tpot_s_p99=_percentile(done.tpot_s, 99),
        normalised_latency_s_mean=_mean(done.normalised_latency_s),
        normalised_latency_s_p99=_percentile(done.normalised_latency_s, 99),
        e2e_s_mean=_mean(done.e2e_s),
        e2e_s_p50=_percentile(done.e2e_s, 50),
        e2e_s_p99=_percentile(done.e2e_s, 99),
        throughput_rps=len(done) / duration_s,
        throughput_tokens_per_s=float(records.produced_tokens.sum()) / duration_s,
        slo_attainment=n_kept / len(records),
        goodput_rps=n_kept / duration_s,
        migrations=int(records.migrations.sum()),
        preemptions=int(records.preemptions.sum()),
    )


def summarise_between(records: RequestRecords, start_s: float, end_s: float, slo: Slo) -> RunSummary:
    """
    Metrics of a part of a run: latencies of requests that arrived in it, throughput of what finished in it.

    Args:
        records: All requests of the run.
        start_s: Start of the part; excludes the time in which the cluster fills.
        end_s: End of the part; excludes the time in which it empties.
        slo: What counts as good.

    Raises:
        ValueError: Nothing arrived in it.
    """
    finished = records.rows((records.finish_s >= start_s) & (records.finish_s < end_s))
    span_s = end_s - start_s
    return replace(
        summarise(records.arrived_in(start_s, end_s), span_s, slo),
        throughput_rps=len(finished) / span_s,
        throughput_tokens_per_s=float(finished.produced_tokens.sum()) / span_s,
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % confidence half-width; NaN with one seed."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        """The mean, and the half-width if there is one."""
        return f"{self.mean:.4g}" if np.isnan(self.half_width) else f"{self.mean:.4g} +- {self.half_width:.2g}"


def interval(values: Sequence[float]) -> Interval:
    """Mean of one value per seed, with Student's t interval at 95 %."""
    column = np.asarray(values, dtype=np.float64)
    if len(column) < 2:
        return Interval(float(column.mean()), float("nan"))
    quantile = float(stats.t.ppf(0.975, len(column) - 1))
    return Interval(float(column.mean()), quantile * float(column.std(ddof=1)) / float(np.sqrt(len(column))))


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _percentile(values: np.ndarray, percent: float) -> float:
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, percent)) if len(finite) else float("nan")
