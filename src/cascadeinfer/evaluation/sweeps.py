"""Policies over a range of rates, and the highest rate at which each keeps an SLO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cascadeinfer.evaluation.pool import map_in_processes
from cascadeinfer.evaluation.runs import RunSpec, label_of, run_once
from cascadeinfer.evaluation.search import HighestRate, highest_rate
from cascadeinfer.evaluation.setting import Setting
from cascadeinfer.results.summary import RunSummary

Curves = dict[str, list[list[RunSummary]]]
"""For each label (a policy, at a token budget) and rate, one summary per seed."""


class Contender(NamedTuple):
    """A policy at a token budget of a step; None: the profile's."""

    policy: str
    max_batched_tokens: int | None = None

    @property
    def label(self) -> str:
        """Its name in curves, tables and files."""
        return label_of(*self)


@dataclass(frozen=True)
class Sweep:
    """
    The common parameters of a sweep's runs.

    Attributes:
        setting: Where to run.
        spec: The run; policy, token budget, rate, seed and number of requests are replaced for each.
        seeds: Runs per policy and rate, with seeds 0, 1, ...
        duration_s: How long requests arrive in each run; None for `spec.requests` of them.
    """

    setting: Setting
    spec: RunSpec
    seeds: int
    duration_s: float | None

    def at(self, contender: Contender, rate_rps: float, seed: int) -> RunSpec:
        """The parameters of one run."""
        policy, budget = contender
        count = self.spec.requests if self.duration_s is None else max(1, round(rate_rps * self.duration_s))
        return replace(
            self.spec, policy=policy, rate_rps=rate_rps, seed=seed, requests=count, max_batched_tokens=budget
        )


@dataclass(frozen=True)
class _Run:
    setting: Setting
    spec: RunSpec


@dataclass(frozen=True)
class _Search:
    sweep: Sweep
    contender: Contender
    known: dict[float, float]
    low_rps: float
    high_rps: float
    share: float
    steps: int


def curves_of(
    sweep: Sweep, contenders: Sequence[Contender], rates_rps: Sequence[float], jobs: int, on_run: Callable[[], None]
) -> Curves:
    """Run everybody at every rate with every seed; calls `on_run` after each run."""
    tasks = [
        _Run(sweep.setting, sweep.at(contender, rate_rps, seed))
        for rate_rps in rates_rps
        for contender in contenders
        for seed in range(sweep.seeds)
    ]
    done: dict[int, RunSummary] = {}
    for number, summary in map_in_processes(_run, tasks, jobs):
        done[number] = summary
        on_run()
    curves: Curves = {contender.label: [[] for _ in rates_rps] for contender in contenders}
    for number, task in enumerate(tasks):
        curves[task.spec.label][rates_rps.index(task.spec.rate_rps)].append(done[number])
    return curves


def highest_rates(
    sweep: Sweep,
    contenders: Sequence[Contender],
    curves: Curves,
    rates_rps: Sequence[float],
    share: float,
    steps: int,
    jobs: int,
    on_contender: Callable[[], None],
) -> dict[str, HighestRate]:
    """For each label, bisect between the rates of its curve where it stops keeping the SLO; see `highest_rate`."""
    tasks = []
    for contender in contenders:
        curve = curves[contender.label]
        known = {rate_rps: mean_attainment(runs) for rate_rps, runs in zip(rates_rps, curve, strict=True)}
        failed = next((i for i, rate_rps in enumerate(rates_rps) if known[rate_rps] < share), len(rates_rps) - 1)
        low_rps = rates_rps[max(0, failed - 1)]
        tasks.append(_Search(sweep, contender, known, low_rps, rates_rps[failed], share, steps))
    found: dict[str, HighestRate] = {}
    for number, result in map_in_processes(_search, tasks, jobs):
        found[tasks[number].contender.label] = result
        on_contender()
    return {label: found[label] for label in curves}


def mean_attainment(runs: Sequence[RunSummary]) -> float:
    """Share of requests within the SLO, mean over seeds."""
    return sum(run.slo_attainment for run in runs) / len(runs)


def _run(task: _Run) -> RunSummary:
    return run_once(task.setting, task.spec).summary


def _search(task: _Search) -> HighestRate:
    def attainment_at(rate_rps: float) -> float:
        if rate_rps in task.known:
            return task.known[rate_rps]
        sweep = task.sweep
        return mean_attainment(
            [run_once(sweep.setting, sweep.at(task.contender, rate_rps, seed)).summary for seed in range(sweep.seeds)]
        )

    return highest_rate(attainment_at, task.low_rps, task.high_rps, task.share, task.steps)
