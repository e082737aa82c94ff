"""
Time to plan, compared with exhaustive search over the same candidates, extrapolated.

    .venv/bin/python benchmarks/micro/planner.py [--profile h100-llama-3.1-8b] [--trace PATH] [--roles]

Workload: lengths from 1 token to 128K (log-normal, seeded) unless a trace is given. Plans at 70 % of the one-stage
capacity. The first plan of each size is not timed (compilation, or loading the compiled code from its cache).
Exhaustive search tries every set of boundaries with every way to assign instances to stages: sum over s of C(c - 1, s -
1) C(n - 1, s - 1) = C(c + n - 2, n - 1) layouts for c intervals and n instances; its time is that number times the
measured time of one compiled prediction per stage. The paper (arXiv 2512.19179) reports about 51 hours for naive search
and 0.06 s for its planner, for 16 instances at 128K.
"""

import argparse
import time
from math import comb, log10
from pathlib import Path

import numpy as np

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.traces import load_trace
from cascadeinfer.core.adapt.role_adaptation import UNITS
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.plan.dynamic_program import MAX_UNITS, stage_costs
from cascadeinfer.core.plan.planner import capacity_rate, solve
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.roles import solve_roles

CONTEXT_TOKENS = 131_072
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS_PER_YEAR = 365.25 * 86_400


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--profile", default="h100-llama-3.1-8b")
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--roles", action="store_true", help="time plans with roles instead")
    options = parser.parse_args()
    profile = load_profile(options.profile)
    longest = min(CONTEXT_TOKENS, profile.capacity.kv_tokens)
    prompts, outputs = lengths(options.trace, longest)
    started = time.perf_counter()
    histogram = LengthHistogram.from_requests(prompts, outputs)
    print(
        f"profile {profile.name}, {len(prompts)} requests up to {int((prompts + outputs).max())} tokens, load "
        f"{options.load:g}"
    )
    print(f"histogram of all of them: {1e3 * (time.perf_counter() - started):.1f} ms (first call)\n")
    if options.roles:
        role_times(profile, histogram, options.load, options.repeats)
        return
    print(
        f"{'instances':>9} {'candidates':>10} {'stages':>6} {'plan ms':>8} {'cpu ms':>7} {'ns/prediction':>13}  "
        "exhaustive search"
    )
    for n in SIZES:
        rate = options.load * capacity_rate(histogram, profile.step_model, profile.capacity, n)
        problem = PlanProblem(histogram, profile.step_model, profile.capacity, rate, n)
        planned = solve(problem)
        wall_s, cpu_s = timed(problem, options.repeats)
        candidates = len(problem.candidates())
        prediction_s = prediction_time_s(problem, options.repeats)
        print(
            f"{n:>9} {candidates:>10} {len(planned.stages):>6} {1e3 * wall_s:>8.2f} {1e3 * cpu_s:>7.2f} "
            f"{1e9 * prediction_s:>13.0f}  {exhaustive(candidates - 1, n, prediction_s)}"
        )
    print("\nplan ms: median wall time of building and solving the problem; cpu ms: median processor time of the same.")


def role_times(profile: CostProfile, histogram: LengthHistogram, load: float, repeats: int) -> None:
    """The same for plans with roles, with the default chunk budgets: in full, and as a server plans that serves."""
    print("| instances | prefill instances | threshold | stages | plan, processor ms | while serving |")
    print("|---|---|---|---|---|---|")
    for n in SIZES[1:]:
        rate = load * capacity_rate(histogram, profile.step_model, profile.capacity, n)
        problem = PlanProblem(histogram, profile.step_model, profile.capacity, rate, n)
        planned = solve_roles(problem)
        whole_ms, serving_ms = (role_plan_ms(problem, units, repeats) for units in (MAX_UNITS, UNITS))
        threshold = planned.threshold_tokens if planned.prefill else "-"
        stages = len(planned.prefill) + len(planned.stages)
        print(f"| {n} | {planned.n_prefill} | {threshold} | {stages} | {whole_ms:.1f} | {serving_ms:.1f} |")


def role_plan_ms(problem: PlanProblem, units: int, repeats: int) -> float:
    """Median processor time of building and solving the problem, with at most so many units."""
    cpus = []
    for _ in range(repeats):
        cpu = time.process_time()
        solve_roles(problem.with_rate(problem.rate_per_s), max_units=units)
        cpus.append(time.process_time() - cpu)
    return 1e3 * float(np.median(cpus))


def lengths(trace: Path | None, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths."""
    if trace is not None:
        loaded = load_trace(trace)
        fits = loaded.total_tokens <= longest
        return loaded.prompt_tokens[fits], loaded.output_tokens[fits]
    rng = np.random.default_rng(0)
    outputs = np.minimum(rng.geometric(1 / 300, 20_000), 4000)
    prompts = np.minimum(rng.lognormal(6.5, 1.8, 20_000).astype(np.int64) + 1, longest - outputs)
    return prompts, outputs


def timed(problem: PlanProblem, repeats: int) -> tuple[float, float]:
    """Median wall and processor time of planning from a histogram."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        solve(problem.with_rate(problem.rate_per_s))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return float(np.median(walls)), float(np.median(cpus))


def prediction_time_s(problem: PlanProblem, repeats: int) -> float:
    """Processor time of one compiled prediction of one stage, averaged over the table that the program needs."""
    candidates = problem.candidates()
    units = min(problem.n_instances, MAX_UNITS)
    times = []
    for _ in range(repeats):
        cpu = time.process_time()
        stage_costs(problem.inputs, candidates, units, problem.n_instances / units)
        times.append(time.process_time() - cpu)
    return float(np.median(times)) / (comb(len(candidates), 2) * units)


def exhaustive(intervals: int, instances: int, prediction_s: float) -> str:
    """Number of layouts and the time to try all, as text."""
    layouts = comb(intervals + instances - 2, instances - 1)
    predictions = sum(
        stages * comb(intervals - 1, stages - 1) * comb(instances - 1, stages - 1)
        for stages in range(1, min(intervals, instances) + 1)
    )
    exponent = log10(predictions) + log10(prediction_s)  # the numbers overflow a float
    if exponent > 12.0:
        return f"10^{log10(layouts):.0f} layouts, 10^{exponent - log10(SECONDS_PER_YEAR):.0f} years"
    seconds = 10.0**exponent
    return f"{layouts:.3g} layouts, {f'{seconds / 3600:.3g} hours' if seconds > 3600 else f'{seconds:.3g} s'}"


if __name__ == "__main__":
    main()
