"""
CPU share of a front end behind which many instances idle: asked ten times a second, and asked once a second.

    python benchmarks/idle_instances.py [--instances 256] [--seconds 10] [--rounds 3] [--policy cascade]

One runtime in this process; the instances are stubs that answer at once, so only the front end's own code is measured,
without the messages to real engines, which cost more per question and are saved in the same proportion. The two sides
alternate in one run. On a machine with other work a side may be asked less often than it should be; `at full pace` is
the CPU time of a question times the questions that are due.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

import measuring
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import EngineCounters
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.supervise import SupervisionTimes

CAPACITY = InstanceCapacity(kv_blocks=10_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=8192)
SIDES = {"as busy ones": 0.1, "rarely": 1.0}
"""Seconds between two questions to an idle instance."""
SETTLING_S = 3.0
POLICIES = {"cascade": Cascade, "round_robin": RoundRobin}


class IdleInstance:
    """Answers questions for its load, and has none."""

    pid = None
    movable = False
    config = None

    def __init__(self, instance_id: str) -> None:
        """An instance that has not started."""
        self.instance_id = instance_id
        self.index = int(instance_id)
        self.questions = 0
        self._killed = asyncio.Event()

    async def start(self) -> InstanceCapacity:
        """Be up."""
        return CAPACITY

    async def connect(self, peers: Any) -> None:
        """Nothing ever moves."""

    async def report(self) -> tuple[InstanceReport, EngineCounters]:
        """A new report each time, as one that was decoded from a message."""
        self.questions += 1
        await asyncio.sleep(0)
        return InstanceReport((), (), (), (), 0), EngineCounters(held_blocks={"reservations": 0, "pins": 0})

    async def next_outputs(self) -> Any:
        """There are none."""
        await self._killed.wait()

    async def stop(self, timeout_s: float) -> None:
        """Nothing to stop."""

    def kill(self) -> None:
        """Nothing to kill."""


@dataclass(frozen=True, slots=True)
class Share:
    """CPU seconds per second, questions per second, microseconds of CPU per question."""

    cpu: float
    questions_per_s: float
    question_us: float


async def _know_each_other(engine: Any) -> None:
    """Skip the handshakes, of which there are thousands, at the start."""


async def measure(policy: Policy, n_instances: int, idle_report_s: float, seconds: float) -> Share:
    """The front end's CPU share once all instances are quiet."""
    made: dict[str, Any] = {str(number): IdleInstance(str(number)) for number in range(n_instances)}
    runtime = Runtime(
        {instance_id: lambda _, engine=engine: engine for instance_id, engine in made.items()},
        policy,
        lambda read: RuntimeMetrics(CollectorRegistry(), read),
        supervision=SupervisionTimes(report_s=0.1, idle_report_s=idle_report_s),
    )
    runtime.fleet.pairs.introduce = _know_each_other  # type: ignore[method-assign]
    await runtime.start()
    await asyncio.sleep(SETTLING_S)
    asked = sum(engine.questions for engine in made.values())
    began_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    took_s, used_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    asked = sum(engine.questions for engine in made.values()) - asked
    await runtime.stop(0.0)
    return Share(used_s / took_s, asked / took_s, used_s / asked * 1e6)


def main() -> None:
    """Parse, run the sides in turn, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured per side and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", choices=sorted(POLICIES), default="cascade")
    options = parser.parse_args()
    host = measuring.machine()
    layout = StageLayout.single(tuple(str(number) for number in range(options.instances)))
    shares: dict[str, list[Share]] = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name, idle_report_s in SIDES.items():
            policy = Cascade(layout=layout) if options.policy == "cascade" else RoundRobin()
            shares[name].append(asyncio.run(measure(policy, options.instances, idle_report_s, options.seconds)))
    results = {}
    print("| idle instances are asked | questions per s | us per question | share of a core | at full pace |")
    print("|---|---|---|---|---|")
    for name, idle_report_s in SIDES.items():
        median = {field: float(np.median([getattr(share, field) for share in shares[name]])) for field in
                  ("cpu", "questions_per_s", "question_us")}  # fmt: skip
        full = median["question_us"] * 1e-6 * options.instances / idle_report_s
        results[name] = {**median, "cpu_at_full_pace": full}
        print(
            f"| {name} | {median['questions_per_s']:.0f} | {median['question_us']:.0f} | {median['cpu']:.1%} | "
            f"{full:.1%} |"
        )
    print(measuring.write_results("idle_instances", host, vars(options), results))


if __name__ == "__main__":
    main()
