"""
The fewest instances at which a policy keeps an SLO at a rate.

The SLO bounds a percentile of TTFT and the same percentile of TPOT, each by itself. A request that does not finish has
neither, and counts as infinitely late. Three things are kept apart:

- *predicted*: the fewest instances on which some layout carries the rate in steady state (the planner). Fewer are not
  tried: queues would grow without end, however well a run goes that ends before the cluster is full.
- *simulated*: whether a number of instances keeps the SLO. It does if the means of both percentiles over the seeds are
  within their limits.
- *bounded*: what no number of instances can keep. A prompt takes at least as long as alone on an idle instance, a token
  at least a step alone (both from the step model); if a percentile of that is above its limit, nothing is simulated.

The search doubles the number from there until it keeps the SLO, and bisects: its tolerance is one instance. It assumes
that more instances are never worse. The answer was run, and so was one instance less unless it is the predicted number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.errors import ConfigError, PlanError
from cascadeinfer.evaluation.pool import map_in_processes
from cascadeinfer.evaluation.runs import RunSpec, run_once
from cascadeinfer.evaluation.setting import Setting
from cascadeinfer.results.records import FloatColumn, RequestRecords
from cascadeinfer.results.summary import Interval, interval


@dataclass(frozen=True, slots=True)
class Tried:
    """
    A number of instances that was simulated.

    Attributes:
        ttft_s, tpot_s: The percentile, mean over the seeds with its interval.
        e2e_s: Mean end-to-end latency, mean over the seeds.
        keeps: Whether both are within the SLO.
    """

    instances: int
    ttft_s: Interval
    tpot_s: Interval
    e2e_s: float
    keeps: bool


@dataclass(frozen=True, slots=True)
class Capacity:
    """
    The result of a search.

    Attributes:
        instances: The fewest that keep the SLO.
        predicted: The fewest that carry the rate in steady state, by prediction.
        tried: What was simulated, in order of the number.
    """

    instances: int
    predicted: int
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class CapacitySearch:
    """
    The question.

    Attributes:
        setting: Its number of instances is replaced.
        spec: The run; the seed is replaced. Its SLO has the limits.
        percentile: Of TTFT and TPOT, in (0, 100).
        seeds: Runs per number of instances, with seeds 0, 1, ...
        most: Largest number of instances to try.
    """

    setting: Setting
    spec: RunSpec
    percentile: float
    seeds: int
    most: int

    def fewest(self, jobs: int, on_run: Callable[[], None]) -> Capacity:
        """
        Search.

        Args:
            jobs: Processes.
            on_run: Called after each run.

        Raises:
            ConfigError: No number of instances keeps the SLO, or none up to `most`.
        """
        self._check_bounds()
        tried: dict[int, Tried] = {}

        def keeps(n: int) -> bool:
            tried[n] = self._simulate(n, jobs, on_run)
            return tried[n].keeps

        predicted = self.predicted()
        fewest = fewest_that(keeps, predicted, self.most)
        if fewest is None:
            last = tried[self.most]
            raise ConfigError(
                f"not even {self.most} instances keep the SLO: simulated p{self.percentile:g} of TTFT "
                f"{last.ttft_s.mean:.3g} s (limit {self.spec.slo.ttft_s:g}), of TPOT {last.tpot_s.mean:.3g} s "
                f"(limit {self.spec.slo.tpot_s:g})",
                option="--slo",
                fix="raise the limits or --most-instances",
            )
        return Capacity(fewest, predicted, tuple(tried[n] for n in sorted(tried)))

    def predicted(self) -> int:
        """
        The fewest instances on which some layout carries the rate in steady state.

        Raises:
            ConfigError: Not even `most` do.
        """

        def carries(n: int) -> bool:
            try:
                replace(self.setting, n_instances=n).plan(self.spec.rate_rps)
            except PlanError as error:
                if error.capacity_per_s is None:
                    raise
                return False
            return True

        fewest = fewest_that(carries, 1, self.most)
        if fewest is None:
            raise ConfigError(
                f"not even {self.most} instances carry {self.spec.rate_rps:g} requests/s, by prediction",
                option="--slo",
                fix="raise --most-instances",
            )
        return fewest

    def _check_bounds(self) -> None:
        """Refuse limits below what a request takes alone."""
        trace, model = self.setting.trace, self.setting.profile.step_model
        budget = self.setting.profile.capacity.max_batched_tokens
        lengths, rows = np.unique(trace.prompt_tokens, return_inverse=True)
        first_s = np.array([alone_first_s(model, n, budget) for n in lengths.tolist()])[rows]
        next_s = np.array([model.step_s(BatchFeatures(1, n + 1, n + 1)) for n in lengths.tolist()])[rows]
        next_s[trace.output_tokens < 2] = np.nan
        slo = self.spec.slo
        for name, alone_s, limit_s in (("TTFT", first_s, slo.ttft_s), ("TPOT", next_s, slo.tpot_s)):
            least_s = percentile_of(alone_s, self.percentile)
            if least_s > limit_s:
                raise ConfigError(
                    f"no number of instances keeps p{self.percentile:g} of {name} within {limit_s:g} s: alone on an "
                    f"idle instance it is {least_s:.3g} s, by the cost profile",
                    option="--slo",
                    fix="a higher limit, a smaller model or a faster device",
                )

    def _simulate(self, n: int, jobs: int, on_run: Callable[[], None]) -> Tried:
        tasks = [_Run(replace(self.setting, n_instances=n), replace(self.spec, seed=s)) for s in range(self.seeds)]
        found: dict[int, tuple[float, float, float]] = {}
        for number, percentiles in map_in_processes(_Percentiles(self.percentile), tasks, jobs):
            found[number] = percentiles
            on_run()
        ttft_s, tpot_s, latency_s = zip(*(found[number] for number in range(self.seeds)), strict=True)
        slo = self.spec.slo
        keeps = _mean(ttft_s) <= slo.ttft_s and _mean(tpot_s) <= slo.tpot_s
        return Tried(n, _interval(ttft_s), _interval(tpot_s), _mean(latency_s), keeps)


@dataclass(frozen=True)
class _Run:
    setting: Setting
    spec: RunSpec


@dataclass(frozen=True)
class _Percentiles:
    """A run's percentiles of TTFT and TPOT and its mean latency, as a value that another process can have."""

    percentile: float

    def __call__(self, task: _Run) -> tuple[float, float, float]:
        outcome = run_once(task.setting, task.spec)
        return *late_percentiles(outcome.counted, self.percentile), outcome.summary.e2e_s_mean


def fewest_that(keeps: Callable[[int], bool], first: int, most: int) -> int | None:
    """
    The smallest number in [first, most] that keeps something which all larger ones keep as well.

    Args:
        keeps: Asked at most once per number.
        first: Smallest number, at least 1; the closer to the answer, the fewer numbers are asked.
        most: Largest number; None is returned if it does not keep it.
    """
    good, bad, n = most + 1, first - 1, first
    while good - bad > 1:
        if keeps(n):
            good = n
        elif n == most:
            return None
        else:
            bad = n
        n = min(most, 2 * bad) if good > most else (good + bad) // 2
    return good


def late_percentiles(records: RequestRecords, percentile: float) -> tuple[float, float]:
    """Percentiles of TTFT and TPOT, in seconds; what did not finish is infinitely late."""
    unfinished = ~records.finished
    ttft_s = np.where(unfinished, np.inf, records.ttft_s)
    tpot_s = np.where(unfinished, np.inf, records.tpot_s)  # NaN remains for outputs of one token
    return percentile_of(ttft_s, percentile), percentile_of(tpot_s, percentile)


def percentile_of(values_s: FloatColumn, percentile: float) -> float:
    """The least value that this share of the values does not exceed; NaN is left out, and 0 is that of nothing."""
    present = values_s[~np.isnan(values_s)]
    return float(np.percentile(present, percentile, method="inverted_cdf")) if len(present) else 0.0


def alone_first_s(model: StepModel, prompt_tokens: int, max_batched_tokens: int) -> float:
    """Time to the first token of a prompt alone on an idle instance: its chunks, one per step."""
    total_s, done = 0.0, 0
    while done < prompt_tokens:
        chunk = min(max_batched_tokens, prompt_tokens - done)
        attention = float(chunk) * done + chunk * (chunk + 1) / 2.0
        total_s += model.step_s(BatchFeatures(0, 0, 0, chunk, attention))
        done += chunk
    return total_s


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _interval(values: tuple[float, ...]) -> Interval:
    return interval(values) if all(np.isfinite(values)) else Interval(_mean(values), float("nan"))
