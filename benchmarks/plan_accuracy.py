"""
Predicted against simulated QoE: does the planner's model hold at finite load, and does it rank layouts correctly?

    .venv/bin/python benchmarks/plan_accuracy.py --traces ../shared/data/traces [--profiles h100-llama-3.1-8b,...]
        [--loads 0.3,0.5,...]

For each profile, trace and load (share of the one-stage capacity) the best layout of 1, 2, 3 ... stages is predicted
and simulated: `least_loaded` for one stage, `static_stages` with hand-overs for several. Requests are drawn with
replacement from the trace, arrivals are Poisson; only requests that arrive in the middle of the run count, so that the
cluster is full while they run. Regret is how much worse the planner's choice performs in the simulator than the best of
the simulated layouts; all are simulated on the same arrivals. With --rivals, layouts close to the chosen one are
included. Writes Markdown to standard output and one CSV row per run to --csv.
"""

import argparse
import csv
import sys
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.traces import load_trace
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.layout import Proposal
from cascadeinfer.core.plan.planner import Plan, capacity_rate, predict, solve
from cascadeinfer.core.plan.problem import (
    DEFAULT_MARGIN,
    DEFAULT_MAX_STAGES,
    DEFAULT_STAGE_TOLERANCE,
    HandOverCost,
    PlanProblem,
)
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

DEFAULT_TRACES = (
    "azure_2023_conv,sharegpt_v3_firstturn_llama3,sharegpt_8k_llama2,servegen_deepseek_r1_1h,"
    "mooncake_synthetic,bwb_llama2"
)
PULL_S = 0.02
"""
Pause of a hand-over beyond the transfer: set-up of the pull, the commands around it, the steps that end first
(simulated: 20 ms).
"""
RESIDENCES = 12.0
"""Length of a run in mean residences (at least `--seconds`), so that most of it is steady."""
COUNTED = (0.3, 0.75)
"""Arrivals between these shares of the run are counted."""


@dataclass(frozen=True)
class Row:
    """One run; times in milliseconds."""

    profile: str
    trace: str
    load: float
    rate_per_s: float
    stages: int
    boundaries: str
    instances: str
    predicted_ms: float
    simulated_ms: float
    standard_error_ms: float
    ttft_ms: float
    tpot_ms: float
    moves: int
    preemptions: int

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_ms / self.simulated_ms - 1.0


@dataclass(frozen=True)
class Verdict:
    """The planner's choice among the simulated layouts of one point, and how it performs."""

    chosen: Row
    predicted_gain: float
    simulated_gain: float
    regret: float


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--traces", type=Path, default=None, help="folder with <name>.csv.gz")
    parser.add_argument("--names", default=DEFAULT_TRACES)
    parser.add_argument("--profiles", default="h100-llama-3.1-8b,l40s-llama-3.1-8b")
    parser.add_argument("--loads", default="0.3,0.5,0.7,0.85,0.9")
    parser.add_argument("--stages", default="1,2,3,5")
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=40_000, help="most requests in a run")
    parser.add_argument("--margin", type=float, default=DEFAULT_MARGIN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rivals", action="store_true", help="also simulate layouts near the chosen one")
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--read", type=Path, default=None, help="report on the CSV of an earlier run")
    options = parser.parse_args()
    if options.read is not None:
        report(read(options.read), options.margin)
        return
    if options.traces is None:
        parser.error("--traces is needed, unless --read is given")
    rows: list[Row] = []
    for profile_name in options.profiles.split(","):
        profile = load_profile(profile_name)
        for name in options.names.split(","):
            trace = load_trace(options.traces / f"{name}.csv.gz")
            context = min(options.context, profile.capacity.kv_tokens)
            trace = trace.rows(np.flatnonzero(trace.total_tokens <= context))
            for load in (float(part) for part in options.loads.split(",")):
                found = point(profile, name, trace, load, context, options)
                rows += found
                print(f"{profile_name} {name} {load:g}: {cells(found)}", file=sys.stderr, flush=True)
                if options.csv is not None:
                    write(options.csv, rows)
    report(rows, options.margin)


def write(path: Path, rows: list[Row]) -> None:
    """Write one row per run."""
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """Read what `write` wrote."""
    with path.open(newline="") as lines:
        return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in csv.DictReader(lines)]


def point(
    profile: CostProfile, name: str, trace: Trace, load: float, context: int, options: argparse.Namespace
) -> list[Row]:
    """One profile, trace and load: the best layouts of every stage count."""
    histogram = LengthHistogram.from_requests(trace.prompt_tokens, trace.output_tokens)
    n = options.instances
    rate = load * capacity_rate(histogram, profile.step_model, profile.capacity, n)
    hand_over = HandOverCost(PULL_S, profile.kv_bytes_per_token / profile.transfer_bytes_per_s)

    def planned(margin: float, max_stages: int, stage_tolerance: float) -> Plan:
        return solve(
            PlanProblem(
                histogram,
                profile.step_model,
                profile.capacity,
                rate,
                n,
                margin=margin,
                stage_tolerance=stage_tolerance,
                max_stages=max_stages,
                hand_over=hand_over,
            )
        )

    chosen = planned(options.margin, DEFAULT_MAX_STAGES, DEFAULT_STAGE_TOLERANCE)
    layouts = {(chosen.boundaries_tokens, chosen.instances): chosen}
    for stages in (int(part) for part in options.stages.split(",")):
        best = planned(0.0, stages, 0.0)
        if len(best.stages) == stages:
            layouts.setdefault((best.boundaries_tokens, best.instances), best)
    if options.rivals:
        layouts |= rivals(chosen)
    layouts.setdefault(((), (n,)), predict(chosen.problem, Proposal((), (n,))))
    residence_s = max(stage.service.step_s for stage in chosen.stages) * histogram.mean_output_tokens
    seconds = max(options.seconds, RESIDENCES * residence_s)
    count = int(min(options.requests, max(1500, rate * seconds)))
    rng = np.random.default_rng(options.seed)
    sample = trace.rows(np.sort(rng.integers(0, len(trace), count)))
    order = rng.permutation(count)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, count))
    sample = Trace.from_columns(sample.prompt_tokens[order], sample.output_tokens[order], arrivals)
    return [
        run(profile, name, load, layout, sample, context)
        for _, layout in sorted(layouts.items(), key=lambda item: len(item[0][1]))
    ]


def rivals(chosen: Plan) -> dict[tuple[tuple[int, ...], tuple[int, ...]], Plan]:
    """
    Layouts near the chosen one that the planner did not choose: boundaries moved by half, an instance moved to the end
    or start.
    """
    bounds, instances = chosen.boundaries_tokens, chosen.instances
    if not bounds:
        return {}
    wanted = [(tuple(round(factor * b) for b in bounds), instances) for factor in (1 / 1.5, 1.5)]
    for giver, taker in ((0, -1), (-1, 0)):
        moved = list(instances)
        moved[giver] -= 1
        moved[taker] += 1
        if min(moved) >= 1:
            wanted.append((bounds, tuple(moved)))
    found = (predict(chosen.problem, Proposal(*layout)) for layout in wanted)
    return {(layout.boundaries_tokens, layout.instances): layout for layout in found if np.isfinite(layout.cost)}


def run(profile: CostProfile, name: str, load: float, layout: Plan, trace: Trace, context: int) -> Row:
    """Simulate one layout."""
    n = layout.problem.n_instances
    config = SimConfig(
        instances=n,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=context,
        network=NetworkConfig(link_bytes_per_s=profile.transfer_bytes_per_s),
    )
    policy = StaticStages(layout=layout.layout(instance_ids(n))) if len(layout.stages) > 1 else LeastLoaded()
    result = simulate(trace, policy, config)
    start, end = (share * trace.duration_s for share in COUNTED)
    counted = result.requests.arrived_in(start, end)
    latencies = 1e3 * counted.normalised_latency_s
    return Row(
        profile.name,
        name,
        load,
        layout.problem.rate_per_s,
        len(layout.stages),
        joined(layout.boundaries_tokens),
        joined(layout.instances),
        1e3 * layout.cost,
        float(np.mean(latencies)),
        float(np.std(latencies) / np.sqrt(max(1, len(latencies)))),
        1e3 * float(np.mean(counted.ttft_s)),
        1e3 * float(np.nanmean(counted.tpot_s)),
        len(result.migrations.row),
        int(result.requests.preemptions.sum()),
    )


def joined(numbers: tuple[int, ...]) -> str:
    """Numbers in the way people write layouts."""
    return "/".join(str(number) for number in numbers)


def cells(rows: list[Row]) -> str:
    """Predicted and simulated cost, by number of stages."""
    return ", ".join(f"{r.stages}: {r.predicted_ms:.1f} / {r.simulated_ms:.1f} ({r.error:+.0%})" for r in rows)


def verdict_on(rows: list[Row], margin: float) -> Verdict:
    """
    The planner's rule: the fewest stages within the tolerance of the best prediction; one stage unless that gains the
    margin.
    """
    one = next(row for row in rows if row.stages == 1)
    best = min(row.predicted_ms for row in rows)
    near = [row for row in rows if row.predicted_ms <= best * (1.0 + DEFAULT_STAGE_TOLERANCE)]
    pick = min(near, key=lambda row: (row.stages, row.predicted_ms))
    gain = 1.0 - pick.predicted_ms / one.predicted_ms
    chosen = pick if gain >= margin else one
    fastest = min(row.simulated_ms for row in rows)
    return Verdict(chosen, gain, 1.0 - chosen.simulated_ms / one.simulated_ms, chosen.simulated_ms / fastest - 1.0)


def report(rows: list[Row], margin: float) -> None:
    """The tables of docs/planning.md."""
    points: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        points.setdefault((row.profile, row.trace, row.load), []).append(row)
    print(
        "| profile | trace | load | stages: predicted / simulated ms per token (error) | chosen | simulated gain | "
        "regret |"
    )
    print("|---|---|---|---|---|---|---|")
    for (profile, trace, load), runs in points.items():
        v = verdict_on(runs, margin)
        print(
            f"| {profile} | {trace} | {load:.0%} | {cells(runs)} | {v.chosen.stages} | {v.simulated_gain:.1%} | "
            f"{v.regret:.1%} |"
        )
    print("\n| load | runs | median error | 90th percentile | worst | order of pairs right |")
    print("|---|---|---|---|---|---|")
    loads = sorted({row.load for row in rows})
    for label, members in [*((f"{load:.0%}", {load}) for load in loads), ("all", set(loads))]:
        errors = np.abs([row.error for row in rows if row.load in members])
        pairs = [
            (a.predicted_ms < b.predicted_ms) == (a.simulated_ms < b.simulated_ms)
            for (_, _, load), runs in points.items()
            if load in members
            for a, b in combinations(runs, 2)
            if abs(a.predicted_ms / b.predicted_ms - 1.0) > DEFAULT_STAGE_TOLERANCE
        ]
        print(
            f"| {label} | {len(errors)} | {np.median(errors):.1%} | {np.quantile(errors, 0.9):.1%} | "
            f"{errors.max():.1%} "
            f"| {np.mean(pairs):.0%} of {len(pairs)} |"
        )
    print(
        "\n| margin | points | several stages chosen | mean simulated gain | median regret | worst regret | above 3 % |"
    )
    print("|---|---|---|---|---|---|---|")
    for tried in sorted({0.0, 0.02, 0.03, 0.05, 0.1, margin}):
        verdicts = [verdict_on(runs, tried) for runs in points.values()]
        regrets = np.array([v.regret for v in verdicts])
        print(
            f"| {tried:.0%} | {len(verdicts)} | {sum(v.chosen.stages > 1 for v in verdicts)} "
            f"| {np.mean([v.simulated_gain for v in verdicts]):.1%} | {np.median(regrets):.1%} | {regrets.max():.1%} "
            f"| {int((regrets > 0.03).sum())} |"
        )


if __name__ == "__main__":
    main()
