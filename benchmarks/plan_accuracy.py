r"""
Predicted against simulated latency of plans of every kind at every token budget of a step: tables of docs/planning.md.

    .venv/bin/python benchmarks/plan_accuracy.py --traces ../shared/data/traces \
        --results benchmarks/results/plan_accuracy.json

For each point (profile, trace, load), kind and budget, the plan that the planner finds best among those of that kind
and budget is simulated once, with the policy that carries it out: `roles`, which is the cascade with fixed ranges where
a plan has no prefill stages. Kinds: `one` stage, `cascade` (several), `split` (prefill instances for all prompts, one
stage that decodes), `hybrid` (prefill instances from a threshold on, stages by length). The load is a share of what one
stage carries at the profile's own budget.

Runs are in the steady state: requests arrive for `warm_up_s` before those that count, and go on arriving for as long
after them. After `warm_up_s`, the KV cache holds all but `UNSETTLED` of what it holds in the steady state.

The results file keeps plans and what was simulated, no prediction: the report predicts anew, with the code that is
there (`--report`), so that a change of the model is judged by the same simulations.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from cascadeinfer.core.cost.qoe import StageService, range_service
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import RoleLayout, Stage, StageKind, StageLayout
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.role_plan import PushCost
from cascadeinfer.core.plan.role_tables import decode_table, prefill_table, push_cost
from cascadeinfer.core.plan.roles import RoleSearcher
from cascadeinfer.core.policies.roles import Roles
from cascadeinfer.core.types import UNBOUNDED_TOKENS, LengthRange
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.drawing import ArrivalLaw, draw_requests

CONTEXT_TOKENS: Final = 32_768
POINTS: Final = (
    "h100-llama-3.1-8b azure_2023_conv",
    "a100-llama-3.1-8b azure_2023_conv",
    "h100-llama-3.1-70b-tp4 sharegpt_8k_llama2",
    "h100-llama-3.1-8b mooncake_synthetic",
    "h100-llama-3.1-8b servegen_deepseek_r1_1h",
    "a100-llama-3.1-8b sharegpt_8k_llama2",
)
"""Profiles and traces. No constant of the model was fitted to the A100, the 70B or DeepSeek-R1."""
KINDS: Final = ("one", "cascade", "split", "hybrid")
BUDGETS: Final = (512, 1024, 2048, 8192)
LOADS: Final = (0.85, 0.5, 0.7)
MARGINS: Final = (0.0, 0.03, 0.05, 0.1)
UNSETTLED: Final = 0.02
TELLING: Final = 0.02
"""Two plans whose predictions differ by less than this share are level: their order says nothing."""
RESOLVED: Final = 2.0
"""Nor does it when the simulations differ by less than this many standard errors."""
SETTLED: Final = 0.2
"""A run whose later half is slower than the earlier one by more than this share has no steady state to compare with."""


class Part(NamedTuple):
    """One stage of a plan; `hi` is `UNBOUNDED_TOKENS` in the last one of its kind."""

    prefill: bool
    lo: int
    hi: int
    n: int


@dataclass(frozen=True)
class Run:
    """
    One simulated plan.

    Attributes:
        parts: Prefill stages first.
        drift: Mean normalised latency of the later half of the counted requests over the earlier half's, minus 1; far
            above 0 where the load is not carried.
    """

    profile: str
    trace: str
    load: float
    kind: str
    budget: int
    rate_per_s: float
    parts: tuple[Part, ...]
    requests: int
    counted: int
    norm_ms: float
    norm_error_ms: float
    ttft_ms: float
    tpot_ms: float
    drift: float

    @property
    def key(self) -> tuple[str, str, float, str, int]:
        """What it is a run of."""
        return self.profile, self.trace, self.load, self.kind, self.budget


@dataclass(frozen=True)
class Judged:
    """A run with its prediction in milliseconds per token; infinite where the model calls the load infeasible."""

    run: Run
    predicted_ms: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_ms / self.run.norm_ms - 1.0


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--traces", type=Path, required=True, help="folder with <name>.csv.gz")
    parser.add_argument("--results", type=Path, required=True, help="JSON file; what is there is not run again")
    parser.add_argument("--points", default=",".join(POINTS), help="profile and trace, separated by a space")
    parser.add_argument("--loads", default=",".join(f"{load:g}" for load in LOADS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--counted", type=int, default=12_000, help="requests of a run that count, at least")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    runs = read(options.results)
    if not options.report:
        for load, point in product(map(float, options.loads.split(",")), options.points.split(",")):
            fill(runs, point, load, options)
    report([Judged(run, 1e3 * predicted_s(run, options)) for run in runs.values()])


def fill(runs: dict[tuple[object, ...], Run], point: str, load: float, options: argparse.Namespace) -> None:
    """Run what is missing of one point and load."""
    profile, trace = point.split()
    for budget, kind in product(map(int, options.budgets.split(",")), options.kinds.split(",")):
        if (profile, trace, load, kind, budget) in runs:
            continue
        setting = setting_of(profile, trace, options)
        rate = load * setting.one_stage_capacity_rps
        parts = plan_of(setting.with_token_budget(budget), rate, kind)
        if parts is None:
            print(f"{point} {load:g} {kind} @{budget}: no such plan carries it", file=sys.stderr, flush=True)
            continue
        run = run_of(setting.with_token_budget(budget), trace, load, rate, kind, parts, options.counted)
        runs[run.key] = run
        options.results.write_text(json.dumps([asdict(r) for r in runs.values()], indent=0) + "\n")
        judged = Judged(run, 1e3 * predicted_s(run, options))
        print(
            f"{point} {load:g} {kind} @{budget}: {judged.predicted_ms:.1f} / {run.norm_ms:.1f} ({judged.error:+.0%}), "
            f"drift {run.drift:+.0%}",
            file=sys.stderr,
            flush=True,
        )


def read(file: Path) -> dict[tuple[object, ...], Run]:
    """The runs of a results file; none when there is no file."""
    if not file.exists():
        return {}
    rows = [Run(**{**row, "parts": tuple(Part(*p) for p in row["parts"])}) for row in json.loads(file.read_text())]
    return {run.key: run for run in rows}


def setting_of(profile: str, trace: str, options: argparse.Namespace) -> Setting:
    """The setting of a point, at the profile's own budget."""
    return _setting(profile, options.traces / f"{trace}.csv.gz", options.instances)


@cache
def _setting(profile: str, trace: Path, instances: int) -> Setting:
    return load_setting(profile, trace, instances, CONTEXT_TOKENS, accept_poor_profile=True)


def plan_of(setting: Setting, rate: float, kind: str) -> tuple[Part, ...] | None:
    """The best plan of a kind at the setting's budget; None when none carries the rate. One stage is always taken."""
    if kind == "one":
        return (Part(False, 0, UNBOUNDED_TOKENS, setting.n_instances),)
    problem = setting.problem(rate)
    push = PushCost(pause_per_token_s=problem.hand_over.pause_per_token_s)
    most = 1 if kind == "split" else problem.max_stages
    budgets = (setting.profile.capacity.max_batched_tokens,)
    searcher = RoleSearcher(problem, budgets, push, max_stages=most, max_prefill=1)
    match kind:
        case "cascade":
            choices = [choice for choice in searcher.choices(None) if choice.stages > 1]
        case "split":
            choices = searcher.choices(0)
        case _:
            choices = [choice for n in searcher.thresholds() if n for choice in searcher.choices(n)]
    best = min(choices, key=lambda choice: choice.cost, default=None)
    if best is None or not np.isfinite(best.cost):
        return None
    stages = searcher.plan(best, np.inf).every
    return tuple(
        Part(stage.kind is StageKind.PREFILL, stage.range.lo_tokens, stage.range.hi_tokens, stage.n_instances)
        for stage in stages
    )


def layout_of(parts: Iterable[Part], n_instances: int) -> RoleLayout:
    """The plan on instances, prefill stages first."""
    left = list(instance_ids(n_instances))
    prefill: list[Stage] = []
    rest: list[Stage] = []
    for part in parts:
        ids, left = tuple(left[: part.n]), left[part.n :]
        (prefill if part.prefill else rest).append(Stage(LengthRange(part.lo, part.hi), ids))
    return RoleLayout(StageLayout(tuple(rest)), tuple(prefill))


def predicted_s(run: Run, options: argparse.Namespace) -> float:
    """The model's mean normalised latency of a run's plan, in seconds per token."""
    problem = setting_of(run.profile, run.trace, options).problem(run.rate_per_s)
    return cost_of(problem, [(part, run.budget) for part in run.parts])


def cost_of(problem: PlanProblem, parts: Sequence[tuple[Part, int]]) -> float:
    """The predicted objective of a plan: its parts, each with its budget. The problem's own budget is not used."""
    edges = problem.histogram.edges_tokens
    threshold = next((int(np.searchsorted(edges, part.lo)) for part, _ in parts if part.prefill), None)
    total = 0.0
    if threshold is not None:
        total = push_cost(problem.inputs.table, threshold, PushCost().pause_s, problem.hand_over.pause_per_token_s)
    for part, budget in parts:
        inputs = replace(problem, capacity=problem.capacity.with_token_budget(budget)).inputs
        if part.prefill:
            inputs = inputs._replace(table=prefill_table(inputs.table))
        elif threshold is not None:
            inputs = inputs._replace(table=decode_table(inputs.table, threshold))
        high = len(edges) - 1 if part.hi == UNBOUNDED_TOKENS else int(np.searchsorted(edges, part.hi))
        service: StageService = range_service(inputs, int(np.searchsorted(edges, part.lo)), high, float(part.n))
        total += service.cost
    return total


def warm_up_s(setting: Setting, rate: float) -> float:
    """Seconds after which all but `UNSETTLED` of the KV cache's steady content is there, as one stage is predicted."""
    try:
        step_s = setting.plan(rate).stages[0].service.step_s
    except PlanError:
        step_s = 2.0 * setting.problem(rate).step_model.base_s
    prompts, outputs = setting.trace.prompt_tokens.astype(float), setting.trace.output_tokens.astype(float)
    held = np.sum(outputs * (prompts + 0.5 * outputs))
    low, high = 0.0, float(outputs.max())
    while high - low > 1.0:
        middle = 0.5 * (low + high)
        left = np.maximum(outputs - middle, 0.0)
        if np.sum(left * (prompts + outputs - 0.5 * left)) > UNSETTLED * held:
            low = middle
        else:
            high = middle
    return high * step_s


def run_of(
    setting: Setting, trace: str, load: float, rate: float, kind: str, parts: tuple[Part, ...], counted: int
) -> Run:
    """Simulate one plan."""
    profile, n = setting.profile, setting.n_instances
    warm_s = warm_up_s(setting, rate)
    counting_s = max(counted / rate, warm_s)
    requests = int(rate * (2.0 * warm_s + counting_s))
    workload = draw_requests(setting.trace, ArrivalLaw(), requests, rate, np.random.default_rng(0))
    config = SimConfig(
        instances=n,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=setting.context_tokens,
        network=NetworkConfig(link_bytes_per_s=profile.transfer_bytes_per_s),
    )
    policy = Roles(roles=layout_of(parts, n), step_model=profile.step_model, replan=False)
    result = simulate(workload, policy, config)
    seen = result.requests.arrived_in(warm_s, warm_s + counting_s)
    norm = 1e3 * seen.normalised_latency_s
    later = seen.arrival_s > warm_s + 0.5 * counting_s
    return Run(
        profile.name,
        trace,
        load,
        kind,
        profile.capacity.max_batched_tokens,
        rate,
        parts,
        requests,
        len(norm),
        float(norm.mean()),
        float(norm.std() / np.sqrt(len(norm))),
        1e3 * float(seen.ttft_s.mean()),
        1e3 * float(np.nanmean(seen.tpot_s)),
        float(norm[later].mean() / norm[~later].mean() - 1.0),
    )


def report(judged: Sequence[Judged]) -> None:
    """Tables of errors, by kind, budget, load and point."""
    print("| part | runs | median | median of absolute | 90th percentile | unsettled | infeasible | order right |")
    print("|" + "---|" * 8)
    line("all", judged)
    for name in ("kind", "budget", "load", "profile", "trace"):
        for value in dict.fromkeys(getattr(j.run, name) for j in judged):
            line(f"{name} {value}", [j for j in judged if getattr(j.run, name) == value])
    margins(judged)
    worst = sorted((j for j in judged if np.isfinite(j.error)), key=lambda j: -abs(j.error))
    print("\n| worst | predicted / simulated ms per token | error | drift |\n|---|---|---|---|")
    for j in worst[:12]:
        r = j.run
        what = f"{r.profile} {r.trace} {r.load:.0%} {r.kind} @{r.budget}"
        print(f"| {what} | {j.predicted_ms:.1f} / {r.norm_ms:.1f} | {j.error:+.0%} | {r.drift:+.0%} |")


def margins(judged: Sequence[Judged]) -> None:
    """What a margin of the planner costs: one stage against several, at each point and budget."""
    every = {j.run.key: j for j in judged}
    pairs = [(j, every[key]) for j in judged if j.run.kind == "one" and (key := _several(j.run)) in every]
    print("\n| margin | points | several stages chosen | mean simulated gain | worst regret | above 3 % |")
    print("|---|---|---|---|---|---|")
    for margin in MARGINS:
        chosen = [many.predicted_ms < (1.0 - margin) * one.predicted_ms for one, many in pairs]
        gains = np.array([1.0 - many.run.norm_ms / one.run.norm_ms for one, many in pairs])
        regrets = np.where(chosen, np.maximum(-gains, 0.0), np.maximum(gains, 0.0))
        print(
            f"| {margin:.0%} | {len(pairs)} | {sum(chosen)} | {np.mean(np.where(chosen, gains, 0.0)):.1%} | "
            f"{regrets.max():.1%} | {int((regrets > 0.03).sum())} |"
        )


def _several(run: Run) -> tuple[object, ...]:
    return run.profile, run.trace, run.load, "cascade", run.budget


def line(name: str, judged: Sequence[Judged]) -> None:
    """One row of the table: errors and order of pairs, of runs that settled and whose plan is called feasible."""
    feasible = [j for j in judged if np.isfinite(j.error)]
    settled = [j for j in feasible if j.run.drift <= SETTLED]
    right = [
        (a.predicted_ms < b.predicted_ms) == (a.run.norm_ms < b.run.norm_ms)
        for a, b in combinations(settled, 2)
        if a.run.key[:3] == b.run.key[:3] and _tells(a, b)
    ]
    errors = np.array([j.error for j in settled])
    absolute = np.abs(errors)
    print(
        f"| {name} | {len(judged)} | {np.median(errors):+.1%} | {np.median(absolute):.1%} | "
        f"{np.quantile(absolute, 0.9):.1%} | {len(feasible) - len(settled)} | {len(judged) - len(feasible)} | "
        + (f"{np.mean(right):.1%} of {len(right)} |" if right else "- |")
    )


def _tells(a: Judged, b: Judged) -> bool:
    """Whether both the predictions and the simulations tell two plans apart."""
    error_ms = float(np.hypot(a.run.norm_error_ms, b.run.norm_error_ms))
    return (
        abs(a.predicted_ms / b.predicted_ms - 1.0) > TELLING
        and abs(a.run.norm_ms - b.run.norm_ms) > RESOLVED * error_ms
    )


if __name__ == "__main__":
    main()
