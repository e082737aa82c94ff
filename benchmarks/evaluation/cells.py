"""
One cell of the grid: a profile, a trace, a load, a policy, a seed. Runs it, keeps its figures in a CSV file, finds them
again.

Loads are shares of the rate that plain load balancing carries in steady state (`Setting.one_stage_capacity_rps`), so
that cells of different GPUs and traces can be compared. A cell's figures are valid for the code that made them: each
row has a fingerprint of the modules that determine them, and a row with another fingerprint is run again.
"""

import csv
import hashlib
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

import cascadeinfer
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.evaluation.runs import RunSpec, run_once
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.results.records import RequestRecords
from cascadeinfer.results.summary import Slo

CONTEXT_TOKENS: Final = 32_768
SECONDS: Final = 60.0
FEWEST_REQUESTS: Final = 4_000
MOST_REQUESTS: Final = 12_000
"""Requests arrive for `SECONDS`, within these limits on their number."""
WARM_UP: Final = 0.2
COOL_DOWN: Final = 0.1
SLO: Final = Slo(ttft_s=2.0, tpot_s=0.1)
SHORT_QUANTILE: Final = 0.5
LONG_QUANTILE: Final = 0.9
DECIDING: Final = ("core", "sim", "workload", "evaluation", "results")
"""Packages that determine a cell's figures."""


@dataclass(frozen=True, slots=True)
class Cell:
    """
    The parameters of a run.

    Attributes:
        max_batched_tokens: Token budget of a step; 0: the profile's.
    """

    profile: str
    trace: str
    load: float
    policy: str
    seed: int
    instances: int = 16
    max_batched_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """
    Results over the counted requests; times in milliseconds except end-to-end latencies, which are in seconds.

    Attributes:
        code: Fingerprint of the code.
        rate_per_s: The load as a rate.
        norm_short_ms: Normalised latency of the shorter half of the requests, by prompt + output.
        norm_long_ms: The same for the longest tenth.
        tokens_per_s: Output tokens of requests that finished in the counted time.
        in_slo: Share within TTFT 2 s and TPOT 100 ms.
        within_5x: Share that took at most 5 times as long as it would alone on an idle instance.
        within_20x: The same for 20 times.
        stages: In force at the end.
        ttft_p99_ms, tpot_p99_ms: NaN in cells that older code made.
        shared: Requests that a backlog sent to another place than their stage's.
    """

    code: str
    rate_per_s: float
    requests: int
    unfinished: int
    norm_ms: float
    norm_p99_ms: float
    norm_short_ms: float
    norm_long_ms: float
    ttft_ms: float
    tpot_ms: float
    e2e_s: float
    e2e_p50_s: float
    e2e_p99_s: float
    tokens_per_s: float
    in_slo: float
    within_5x: float
    within_20x: float
    moves: int
    preemptions: int
    stages: int
    ttft_p99_ms: float = math.nan
    tpot_p99_ms: float = math.nan
    shared: int = 0


Row = TypeVar("Row", Cell, Figures)
Results = dict[Cell, Figures]


def run_cell(cell: Cell, traces: Path) -> Figures:
    """Simulate one cell."""
    setting = _setting(cell.profile, str(traces / f"{cell.trace}.csv.gz"), cell.instances)
    rate_rps = cell.load * setting.one_stage_capacity_rps
    spec = RunSpec(
        cell.policy,
        rate_rps,
        cell.seed,
        requests_of(rate_rps),
        SLO,
        warm_up=WARM_UP,
        cool_down=COOL_DOWN,
        allow_overload=True,
        max_batched_tokens=cell.max_batched_tokens or None,
    )
    outcome = run_once(setting, spec)
    done = outcome.counted.rows(outcome.counted.finished)
    lengths = done.prompt_tokens + done.output_tokens
    slowdown = done.e2e_s / alone_s(setting.profile.step_model, done)
    norm_ms = 1e3 * done.normalised_latency_s
    summary = outcome.summary
    return Figures(
        code=fingerprint(),
        rate_per_s=rate_rps,
        requests=summary.requests,
        unfinished=summary.unfinished,
        norm_ms=1e3 * summary.normalised_latency_s_mean,
        norm_p99_ms=1e3 * summary.normalised_latency_s_p99,
        norm_short_ms=float(norm_ms[lengths <= np.quantile(lengths, SHORT_QUANTILE)].mean()),
        norm_long_ms=float(norm_ms[lengths >= np.quantile(lengths, LONG_QUANTILE)].mean()),
        ttft_ms=1e3 * summary.ttft_s_mean,
        tpot_ms=1e3 * summary.tpot_s_mean,
        e2e_s=summary.e2e_s_mean,
        e2e_p50_s=summary.e2e_s_p50,
        e2e_p99_s=summary.e2e_s_p99,
        tokens_per_s=summary.throughput_tokens_per_s,
        in_slo=summary.slo_attainment,
        within_5x=float(np.count_nonzero(slowdown <= 5.0)) / summary.requests,
        within_20x=float(np.count_nonzero(slowdown <= 20.0)) / summary.requests,
        moves=summary.migrations,
        preemptions=summary.preemptions,
        stages=len(outcome.layouts[-1][1].stages) if outcome.layouts else 1,
        ttft_p99_ms=1e3 * summary.ttft_s_p99,
        tpot_p99_ms=1e3 * summary.tpot_s_p99,
        shared=summary.shared,
    )


def requests_of(rate_rps: float) -> int:
    """Number of requests of a run; the same for every policy."""
    return min(MOST_REQUESTS, max(FEWEST_REQUESTS, math.ceil(rate_rps * SECONDS)))


def alone_s(model: StepModel, records: RequestRecords) -> NDArray[np.float64]:
    """
    End-to-end latency of each request on an idle instance.

    Decode steps are priced at the middle of the output; a prompt is one step.
    """
    latencies = np.empty(len(records))
    for row, (prompt, output) in enumerate(zip(records.prompt_tokens, records.output_tokens, strict=True)):
        first = model.step_s(BatchFeatures(0, 0, 0, int(prompt), float(prompt) * (float(prompt) + 1.0) / 2.0))
        middle = int(prompt) + int(output) // 2
        latencies[row] = first + (int(output) - 1) * model.step_s(BatchFeatures(1, middle, middle))
    return latencies


@cache
def _setting(profile: str, trace: str, instances: int) -> Setting:
    return load_setting(profile, Path(trace), instances, CONTEXT_TOKENS)


@cache
def fingerprint() -> str:
    """Fingerprint of the code that determines figures."""
    package = Path(cascadeinfer.__file__).parent
    digest = hashlib.sha256()
    for name in DECIDING:
        for file in sorted((package / name).rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def read(file: Path) -> Results:
    """The cells of a CSV file; none when there is no file."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        return {_typed(Cell, row): _typed(Figures, row) for row in csv.DictReader(lines)}


def append(file: Path, cell: Cell, figures: Figures) -> None:
    """Append one row, after the heading if the file is new."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        if new:
            writer.writerow([f.name for f in (*fields(Cell), *fields(Figures))])
        writer.writerow([_short(value) for value in (*astuple(cell), *astuple(figures))])


def write(file: Path, results: Results, order: Iterable[Cell]) -> None:
    """Write these cells in this order, and no others."""
    file.unlink(missing_ok=True)
    for cell in order:
        if cell in results:
            append(file, cell, results[cell])


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _typed(kind: type[Row], row: dict[str, str]) -> Row:
    return kind(**{f.name: f.type(row[f.name]) for f in fields(kind)})  # type: ignore[operator,arg-type]
