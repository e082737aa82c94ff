"""
Workloads that change while they run, simulated: what refinement and replanning gain there (docs/evaluation.md).

    .venv/bin/python benchmarks/drift.py --traces ../shared/data/traces --results benchmarks/results/drift.json

Workloads, each `DURATION_S` long; a load is a share of what one stage carries of that mix:

- `reasoning`: ShareGPT's lengths in the first third, DeepSeek-R1's in the last; in between the share of R1 grows
  linearly. The load is the same throughout.
- `day`: Azure's conversations, at a load that swings once from the lowest to the highest and back, as in a day.
- `long_burst`: Azure's conversations at half load; in the middle third Mooncake's long prompts come on top.

The cascade and `roles` start with the plan for the first requests (`day`: for the mean rate), and their variants have
parts switched off. Instances of `roles` run 512 requests at most, so that each can be given any token budget. Rivals
run at 512 tokens of a step and at the profile's budget. All see the same requests at the same times; a ratio is to the
whole cascade at the same budget, for `roles-static` to `roles`, and for all others to the cascade at its better budget.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.evaluation.runs import RunSpec, kinds_for, roles_for
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.evaluation.variants import policy_spec, role_search, starts_with_plan
from cascadeinfer.results.summary import Slo
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig
from cascadeinfer.workload.trace import Trace

CONTEXT_TOKENS: Final = 32_768
DURATION_S: Final = 900.0
COUNTED: Final = (0.1, 0.95)
"""Arrivals between these shares of the run count."""
SMALL: Final = 512
ROLES: Final = ("roles", "roles-static")
VARIANTS: Final = ("no-refine", "no-replan", "static", "no-rebalance", "cold")
RIVALS: Final = ("llumnix", "bucket", "least_loaded")
STEADY_LOAD: Final = 0.75
DAY_LOADS: Final = (0.25, 0.95)
BURST_LOADS: Final = (0.5, 0.85)

Shares = NDArray[np.float64]
Figures = dict[str, float]


class Workload(NamedTuple):
    """
    Requests, and what the operator knew before them.

    Attributes:
        start: Lengths in the setting that the run starts with.
        start_rate: Requests per second that the first plan is for.
    """

    requests: Trace
    start: Setting
    start_rate: float


class Mix(NamedTuple):
    """Requests per second from two traces over the run: functions of the share of the run that is over."""

    first: str
    second: str
    rates: Callable[[float, Shares, float, float], tuple[Shares, Shares]]
    start_load: float


def _reasoning(load: float, at: Shares, first: float, second: float) -> tuple[Shares, Shares]:
    share = np.clip(3.0 * at - 1.0, 0.0, 1.0)
    total = load / ((1.0 - share) / first + share / second)
    return (1.0 - share) * total, share * total


def _day(_load: float, at: Shares, first: float, _second: float) -> tuple[Shares, Shares]:
    low, high = DAY_LOADS
    return first * (low + (high - low) * 0.5 * (1.0 - np.cos(2.0 * np.pi * at))), np.zeros_like(at)


def _long_burst(load: float, at: Shares, first: float, second: float) -> tuple[Shares, Shares]:
    more = np.where((at > 1.0 / 3.0) & (at < 2.0 / 3.0), BURST_LOADS[1] - load, 0.0)
    return np.full_like(at, load * first), more * second


MIXES: Final = {
    "reasoning": Mix("sharegpt_v3_firstturn_llama3", "servegen_deepseek_r1_1h", _reasoning, STEADY_LOAD),
    "day": Mix("azure_2023_conv", "azure_2023_conv", _day, sum(DAY_LOADS) / 2.0),
    "long_burst": Mix("azure_2023_conv", "mooncake_synthetic", _long_burst, BURST_LOADS[0]),
}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--traces", type=Path, required=True, help="folder with <name>.csv.gz")
    parser.add_argument("--results", type=Path, required=True, help="JSON file; what is there is not run again")
    parser.add_argument("--profiles", default="a100-llama-3.1-8b,h100-llama-3.1-8b")
    parser.add_argument("--workloads", default=",".join(MIXES))
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--contenders", default="", help="some policies only, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    if strangers := {name for name in options.contenders.split(",") if name} - dict(contenders()).keys():
        parser.error(f"--contenders: there is no {', '.join(sorted(strangers))}")
    results: dict[str, Figures] = json.loads(options.results.read_text()) if options.results.exists() else {}
    points = list(product(options.workloads.split(","), options.profiles.split(",")))
    if not options.report:
        for seed, (workload, profile) in product(range(options.seeds), points):
            fill(results, workload, profile, seed, options)
    report(results, points, range(options.seeds))


def contenders() -> Iterable[tuple[str, int]]:
    """Policies and token budgets; 0 is the profile's."""
    yield from product(("cascade", *(f"cascade-{variant}" for variant in VARIANTS)), (0,))
    yield from product(("cascade", "cascade-static"), (SMALL,))
    yield from product(ROLES, (0,))
    yield from product(RIVALS, (SMALL, 0))


def fill(results: dict[str, Figures], name: str, profile: str, seed: int, options: argparse.Namespace) -> None:
    """Run what is missing of one point and seed."""
    workload: Workload | None = None
    chosen = options.contenders.split(",") if options.contenders else dict(contenders())
    for policy, budget in contenders():
        key = key_of(name, profile, policy, budget, seed)
        if key in results or policy not in chosen:
            continue
        workload = workload or workload_of(name, profile, seed, options)
        results[key] = run(workload, policy, budget)
        options.results.write_text(json.dumps(results, indent=0) + "\n")
        print(key, {k: float(f"{v:.4g}") for k, v in results[key].items()}, file=sys.stderr, flush=True)


def key_of(workload: str, profile: str, policy: str, budget: int, seed: int) -> str:
    """Key of a run in the results."""
    return f"{workload} {profile} {policy}{f' @{budget}' if budget else ''} {seed}"


@cache
def setting_of(profile: str, trace: Path, instances: int) -> Setting:
    """The setting of one trace."""
    return load_setting(profile, trace, instances, CONTEXT_TOKENS, accept_poor_profile=True)


def workload_of(name: str, profile: str, seed: int, options: argparse.Namespace) -> Workload:
    """Two Poisson processes with the mix's rates, each with the lengths of its trace."""
    mix, rng = MIXES[name], np.random.default_rng(seed)
    settings = [setting_of(profile, options.traces / f"{t}.csv.gz", options.instances) for t in (mix.first, mix.second)]
    capacities = [setting.one_stage_capacity_rps for setting in settings]
    at = (np.arange(4096) + 0.5) / 4096
    columns = []
    for setting, rates in zip(settings, mix.rates(mix.start_load, at, *capacities), strict=True):
        most = float(rates.max(initial=0.0))
        times = np.sort(rng.uniform(0.0, DURATION_S, rng.poisson(most * DURATION_S)))
        kept = times[rng.uniform(size=len(times)) * most < np.interp(times / DURATION_S, at, rates)]  # thinning
        rows = rng.integers(0, len(setting.trace), len(kept))
        columns.append((kept, setting.trace.prompt_tokens[rows], setting.trace.output_tokens[rows]))
    arrivals, prompts, outputs = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.argsort(arrivals, kind="stable")
    requests = Trace.from_columns(prompts[order], outputs[order], arrivals[order])
    return Workload(requests, settings[0], mix.start_load * capacities[0])


def run(workload: Workload, policy: str, budget: int) -> Figures:
    """Simulate one contender."""
    setting = workload.start.with_token_budget(budget or None)
    roles = None
    if role_search(policy) is not None:
        setting = with_slots(setting, SMALL)
        roles = roles_for(setting, RunSpec(policy, workload.start_rate, 0, 1, Slo(1.0, 0.05), allow_overload=True))
    profile = setting.profile
    plan = setting.plan_within_capacity(workload.start_rate) if starts_with_plan(policy) else None
    config = SimConfig(
        instances=setting.n_instances,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=CONTEXT_TOKENS,
        network=NetworkConfig(link_bytes_per_s=profile.transfer_bytes_per_s),
        kinds=kinds_for(setting, roles),
    )
    result = simulate(workload.requests, policy_spec(policy, setting, plan, roles).make(), config)
    counted = result.requests.arrived_in(*(share * DURATION_S for share in COUNTED))
    return {
        "norm_ms": 1e3 * float(counted.normalised_latency_s.mean()),
        "e2e_s": float(counted.e2e_s.mean()),
        "e2e_p99_s": float(np.quantile(counted.e2e_s, 0.99)),
        "ttft_p99_s": float(np.quantile(counted.ttft_s, 0.99)),
        "layouts": float(len(result.layouts)),
        "stages": float(len(result.layouts[-1][1].stages)) if result.layouts else 1.0,
        "moves_per_request": len(result.migrations.row) / len(result.requests),
        "requests": float(len(counted)),
    }


def with_slots(setting: Setting, slots: int) -> Setting:
    """The same with at most this many requests at once on an instance."""
    capacity = setting.profile.capacity
    fewer = replace(capacity, max_num_seqs=min(slots, capacity.max_num_seqs))
    return replace(setting, profile=replace(setting.profile, capacity=fewer))


def report(results: dict[str, Figures], points: Iterable[tuple[str, str]], seeds: Iterable[int]) -> None:
    """Ratios of the figures of each contender to the cascade's."""
    print("| workload | profile | contender | normalised | e2e | e2e p99 | TTFT p99 | layouts | moves |")
    print("|" + "---|" * 9)
    for name, profile in points:
        for policy, budget in contenders():
            base = base_budget(results, name, profile, policy, budget)
            whole_one = "roles" if policy.startswith("roles-") else "cascade"
            keys = [
                (key_of(name, profile, policy, budget, seed), key_of(name, profile, whole_one, base, seed))
                for seed in seeds
            ]
            runs = [(results[mine], results[whole]) for mine, whole in keys if mine in results and whole in results]
            if runs:
                what = f"{policy}{f' @{budget}' if budget else ''}"
                print(f"| {name} | {profile} | {what} | {' | '.join(cells(runs))} |")


def cells(runs: list[tuple[Figures, Figures]]) -> list[str]:
    """Geometric means of ratios of figures, then what the contender did."""
    ratios = {f: [mine[f] / whole[f] for mine, whole in runs] for f in ("norm_ms", "e2e_s", "e2e_p99_s", "ttft_p99_s")}
    done = {f: [mine[f] for mine, _ in runs] for f in ("layouts", "moves_per_request")}
    return [
        *(f"{np.exp(np.mean(np.log(each))):.2f}" for each in ratios.values()),
        *(f"{np.mean(each):.3g}" for each in done.values()),
    ]


def base_budget(results: dict[str, Figures], name: str, profile: str, policy: str, budget: int) -> int:
    """The budget of the cascade that a contender is compared with; the first seed decides which is better."""
    if policy.startswith(("cascade-", "roles-")):
        return budget
    tried = {b: key_of(name, profile, "cascade", b, 0) for b in (0, SMALL)}
    return min(tried, key=lambda b: results[tried[b]]["norm_ms"] if tried[b] in results else np.inf)


if __name__ == "__main__":
    main()
