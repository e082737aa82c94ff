"""
Time per event of `policy.handle`, by policy and kind of event, in a simulated cluster with about 100 requests per
instance:

    python benchmarks/micro/policies.py [--instances 16 256] [--policies cascade ...] [--seconds 8]

The events are those of a real run (simulator, H100, Llama-3.1-8B, 90 % short chats and 10 % long documents; the cascade
is given three stages, so that it hands over), so the mix of kinds is the simulator's: reports, arrivals, ends,
messages, migrations. Only `handle` and `next_timer_s` are timed. Budgets (medians over all events): 20 us at 16
instances, 60 us at 256.
"""

import argparse
import gc
from collections import defaultdict
from itertools import pairwise
from time import perf_counter_ns

import numpy as np

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policy import Policy
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

BUDGET_US = {16: 20.0, 256: 60.0}
RATE_PER_INSTANCE = 21.0
"""Requests per second: about 100 present in steady state."""


class Timed:
    """A policy that times its calls."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.us: dict[str, list[float]] = defaultdict(list)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        start = perf_counter_ns()
        effects = self._policy.handle(event, now_s)
        self.us[type(event).__name__].append((perf_counter_ns() - start) / 1e3)
        return effects

    def next_timer_s(self) -> float | None:
        """See `Policy.next_timer_s`."""
        start = perf_counter_ns()
        timer_s = self._policy.next_timer_s()
        self.us["next_timer_s"].append((perf_counter_ns() - start) / 1e3)
        return timer_s


def workload(instances: int, seconds: float) -> Trace:
    """90 % short chats, 10 % long documents, Poisson arrivals."""
    rng = np.random.default_rng(1)
    rate = RATE_PER_INSTANCE * instances
    n = int(rate * seconds)
    is_short = rng.random(n) < 0.9
    prompts = np.where(is_short, rng.integers(50, 400, n), rng.integers(3000, 9000, n))
    outputs = np.where(is_short, rng.integers(50, 500, n), rng.integers(200, 600, n))
    return Trace.from_columns(prompts, outputs, np.cumsum(rng.exponential(1.0 / rate, n)))


def make(name: str, instances: int, config: SimConfig) -> Policy:
    """A fresh policy, with stages where it supports them."""
    ids = instance_ids(instances)
    cuts = (0, instances // 4, instances // 2, instances)
    layout = StageLayout.from_boundaries((300, 1500), tuple(ids[a:b] for a, b in pairwise(cuts)))
    if name == "cascade":
        return Cascade(layout=layout, step_model=config.step_model, replan=False)
    info = POLICIES[name]
    return info.make(layout=layout) if info.takes_layout else info.make()


def measure(name: str, instances: int, seconds: float) -> None:
    """One run, one table."""
    profile = load_profile("h100-llama-3.1-8b")
    config = SimConfig(
        instances=instances,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        stop_s=seconds,
    )
    policy = Timed(make(name, instances, config))
    gc.disable()  # a collection of the whole simulation is no cost of the event that it happens to interrupt
    result = simulate(workload(instances, seconds), policy, config)
    gc.enable()
    steady = result.samples.time_s > 0.75 * seconds
    present = (result.samples.running + result.samples.waiting)[steady].mean()
    handled = np.concatenate([times for kind, times in policy.us.items() if kind != "next_timer_s"])
    budget = f" (budget {BUDGET_US[instances]:g})" if instances in BUDGET_US else ""
    print(
        f"{name}, {instances} instances, {present:.0f} requests each: {len(handled)} events, "
        f"median {np.median(handled):.1f} us{budget}, mean {handled.mean():.1f}, p99 {np.quantile(handled, 0.99):.1f}"
    )
    for kind, times in sorted(policy.us.items()):
        low, high = np.quantile(times, [0.5, 0.99])
        print(f"    {kind:20s} {len(times):8d}   median {low:7.1f}   p99 {high:7.1f}")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--policies", nargs="+", default=["cascade"], choices=sorted(POLICIES))
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    for instances in arguments.instances:
        for name in arguments.policies:
            measure(name, instances, arguments.seconds)


if __name__ == "__main__":
    main()
