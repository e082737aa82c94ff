"""
Speed of the simulator: virtual seconds per second of one core.

    .venv/bin/python benchmarks/micro/simulator.py [--trace PATH] [--rate 40] [--instances 16]
        [--policies round_robin,cascade]

Workload: lengths drawn from the ShareGPT trace beside the checkout, Poisson arrivals, on a cluster with the step times
of the profile. The stages of `static_stages` and `cascade` are the planner's, or an even cut when it wants a single
stage, so that requests do move. Each policy runs once untimed (compilation, or loading the compiled code from its
cache) and then `--repeats` times; the fastest run counts, in processor time, because other work on the machine only
ever adds. The policy's share is measured in one more run, with a clock around each of its calls. The last line runs the
first policy step by step, with `fast_forward` off, which shows what the compiled stretches save.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.traces import load_trace
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.plan.planner import plan
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.info import Circumstances
from cascadeinfer.core.policy import Policy
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.arrivals import poisson_arrivals
from cascadeinfer.workload.trace import Trace

TRACE = Path(__file__).parents[2].parent / "shared" / "data" / "traces" / "sharegpt_v3_firstturn_llama3.csv.gz"
CONTEXT_TOKENS = 32_768


class Clocked:
    """A policy that times its calls."""

    def __init__(self, policy: Policy) -> None:
        self.spent_s = 0.0
        self.calls = 0
        self._policy = policy

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        self.calls += 1
        started_s = time.thread_time()
        effects = self._policy.handle(event, now_s)
        self.spent_s += time.thread_time() - started_s
        return effects

    def next_timer_s(self) -> float | None:
        """See `Policy.next_timer_s`."""
        started_s = time.thread_time()
        timer_s = self._policy.next_timer_s()
        self.spent_s += time.thread_time() - started_s
        return timer_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--profile", default="h100-llama-3.1-8b")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--rate", type=float, default=40.0)
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--policies", default="round_robin,least_loaded,static_stages,cascade")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not options.trace.is_file():
        parser.error(f"--trace: there is no file {options.trace}")
    profile = load_profile(options.profile)
    trace = workload(options.trace, options.rate, options.requests)
    config = SimConfig(
        instances=options.instances,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=CONTEXT_TOKENS,
        network=NetworkConfig(link_bytes_per_s=profile.transfer_bytes_per_s),
    )
    layout = stages(profile, trace, options.rate, options.instances)
    print(
        f"{profile.name}, {options.instances} instances, {options.rate:g} requests/s for {trace.duration_s:.0f} s "
        "virtual; "
        f"stages cut at {layout.boundaries_tokens}\n"
    )
    print(
        f"{'policy':>16} {'cpu s':>7} {'x real time':>11} {'steps':>9} {'events':>8} {'moves':>6} "
        f"{'policy us/call':>14} {'calls':>7}"
    )
    names = options.policies.split(",")
    for name in names:
        best_s, result = fastest(trace, lambda n=name: make(n, profile, layout), config, options.repeats)
        clocked = Clocked(make(name, profile, layout))
        simulate(trace, clocked, config)
        row(name, best_s, trace, result, f"{1e6 * clocked.spent_s / clocked.calls:>14.1f} {clocked.calls:>7}")
    slow = replace(config, fast_forward=False)
    best_s, result = fastest(trace, lambda: make(names[0], profile, layout), slow, 1)
    row(f"{names[0]}, slow", best_s, trace, result, "")


def row(name: str, cpu_s: float, trace: Trace, result: SimResult, policy: str) -> None:
    """Print one line."""
    moved = sum(outcome == "moved" for outcome in result.migrations.outcome)
    print(
        f"{name:>16} {cpu_s:>7.2f} {trace.duration_s / cpu_s:>11.0f} {result.steps:>9} {result.events:>8} "
        f"{moved:>6} {policy}"
    )


def workload(path: Path, rate_rps: float, n: int) -> Trace:
    """Requests with lengths from the trace and Poisson arrivals."""
    rng = np.random.default_rng(0)
    lengths = load_trace(path).capped(CONTEXT_TOKENS).trace.resample(n, rng)
    return lengths.with_arrivals(poisson_arrivals(rate_rps, n, rng))


def stages(profile: CostProfile, trace: Trace, rate_rps: float, instances: int) -> StageLayout:
    """The planned stages, or two halves cut at the median length."""
    histogram = LengthHistogram.from_requests(trace.prompt_tokens, trace.output_tokens)
    ids = instance_ids(instances)
    layout = plan(histogram, profile.step_model, profile.capacity, rate_rps, instances).layout(ids)
    if len(layout.stages) > 1 or instances < 2:
        return layout
    median = int(np.median(trace.total_tokens))
    return StageLayout.from_boundaries((median,), (ids[: instances // 2], ids[instances // 2 :]))


def make(name: str, profile: CostProfile, layout: StageLayout) -> Policy:
    """A fresh policy."""
    info = POLICIES[name]
    layout_to_start = layout if info.starts_with_plan else None
    return info.make(**info.options_for(Circumstances(layout=layout_to_start, step_model=profile.step_model)))


def fastest(trace: Trace, fresh: Callable[[], Policy], config: SimConfig, repeats: int) -> tuple[float, SimResult]:
    """Least processor time of a run, after an untimed one."""
    result = simulate(trace, fresh(), config)
    times_s = []
    for _ in range(repeats):
        policy = fresh()
        started_s = time.process_time()
        result = simulate(trace, policy, config)
        times_s.append(time.process_time() - started_s)
    return min(times_s), result


if __name__ == "__main__":
    main()
