"""
Cost of the runtime per token and per load report: its own code, without engines, network or detokenisation.

    python benchmarks/runtime_per_token.py [--requests 32] [--steps 2000] [--repetitions 15]

The runtime gets step outputs as an engine would send them (one token for each running request) and hands them on, and
load reports, which the policy sees. The engine is a stub that does nothing. Reported are best and median over
repetitions of the mean time per call: the best is the cost of the code, the median includes this machine's noise.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

import measuring
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import EngineCounters, EngineRequest
from cascadeinfer.runtime.instance_state import Happening
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.shell import Runtime

PROMPT_TOKENS = 64
CAPACITY = InstanceCapacity(kv_blocks=100_000, block_size_tokens=16, max_num_seqs=4096, max_batched_tokens=8192)


class StubEngine:
    """Accepts every request and sends nothing by itself."""

    instance_id = "0"
    pid = None
    node = ""

    async def add(self, *_: Any) -> None:
        """Take a request."""


@dataclass(slots=True)
class Delta:
    """One token of one request, in the form of vLLM's EngineCoreOutput."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any = None
    kv_transfer_params: Any = None
    events: Any = None


@dataclass(slots=True)
class Step:
    """The outputs of one step."""

    outputs: list[Delta]


async def a_busy_runtime(policy: Policy, n_requests: int) -> tuple[Runtime, StubEngine]:
    """A runtime with one instance and this many requests running on it."""
    runtime = Runtime({"0": lambda _: engine}, policy, lambda read: RuntimeMetrics(CollectorRegistry(), read))
    engine: Any = StubEngine()
    supervisor = runtime.fleet["0"].supervisor
    supervisor.engine = engine
    for happening in (Happening.START, Happening.STARTED):
        supervisor.happen(happening)
    await runtime.instance_up(engine, CAPACITY)
    for number in range(n_requests):
        await runtime.submit(EngineRequest(f"r{number}", list(range(PROMPT_TOKENS)), 10**9, None))
    return runtime, engine


def seconds_per_call(call: Callable[[Any], None], arguments: list[Any]) -> float:
    """Mean time of the calls."""
    began_s = time.perf_counter()
    for argument in arguments:
        call(argument)
    return (time.perf_counter() - began_s) / len(arguments)


async def measure(policy: Policy, n_requests: int, n_steps: int, repetitions: int) -> dict[str, Any]:
    """Microseconds per token delivered and per report handled."""
    runtime, engine = await a_busy_runtime(policy, n_requests)
    ids = tuple(f"r{number}" for number in range(n_requests))
    tokens_us, reports_us = [], []
    for repetition in range(repetitions):
        steps = [Step([Delta(i, [7]) for i in ids]) for _ in range(n_steps)]
        tokens_us.append(
            seconds_per_call(lambda step: runtime.instance_outputs(engine, step), steps) / n_requests * 1e6
        )
        for _ in steps:
            await runtime.next_outputs()
        length = PROMPT_TOKENS + n_steps * (repetition + 1)
        report = InstanceReport(ids, (length,) * n_requests, (), (), n_requests * length // 16)
        counters = EngineCounters()
        reports = [report] * (n_steps // 10)
        reports_us.append(
            seconds_per_call(lambda report: runtime.instance_reported(engine, report, counters, None), reports) * 1e6  # noqa: B023 - called at once
        )
    return {
        "token_us": {"best": min(tokens_us), "median": float(np.median(tokens_us))},
        "report_us": {"best": min(reports_us), "median": float(np.median(reports_us))},
    }


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32, help="running requests, tokens per step")
    parser.add_argument("--steps", type=int, default=2000, help="steps per repetition")
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    host = measuring.machine()
    results = {}
    print("| policy | per token us, best (median) | per load report us, best (median) |")
    print("|---|---|---|")
    for name, policy in (
        ("round_robin", RoundRobin()),
        ("static_stages", StaticStages(layout=StageLayout.single(("0",)))),
    ):
        result = asyncio.run(measure(policy, options.requests, options.steps, options.repetitions))
        token, report = result["token_us"], result["report_us"]
        print(
            f"| {name} | {token['best']:.2f} ({token['median']:.2f}) | {report['best']:.0f} ({report['median']:.0f}) |"
        )
        results[name] = result
    print(measuring.write_results("runtime_per_token", host, vars(options), results))


if __name__ == "__main__":
    main()
