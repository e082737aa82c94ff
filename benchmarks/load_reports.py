"""
CPU share of a front end's load reports: many idle instances, and many that are busy.

    python benchmarks/load_reports.py [--instances 256] [--running 4] [--seconds 10] [--rounds 3]

One runtime in this process and all the engines, which are stand-ins (`stand_in_engines.py`), in another. Between them
is everything that there is in a server: vLLM's clients, their sockets and messages, supervision, books and the policy
`cascade`. Only this process's CPU time counts. The scenes alternate:

- `idle`: no instance has a request. They are asked once a second, or ten times.
- `busy`: every instance has `--running` requests and sends a token for each of them per step of `--step-s`. Its load
  comes along with that, as it does; or it is asked ten times a second; or there are no reports at all, which leaves the
  tokens alone.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry

import measuring

measuring.quiet_environment()

from cascadeinfer.core.layout import StageLayout  # noqa: E402 - after the environment
from cascadeinfer.core.policies.cascade import Cascade  # noqa: E402
from cascadeinfer.core.policies.round_robin import RoundRobin  # noqa: E402
from cascadeinfer.core.policy import Policy  # noqa: E402
from cascadeinfer.engines.vllm.attached import AttachedCore  # noqa: E402
from cascadeinfer.engines.vllm.attachment import Attachment  # noqa: E402
from cascadeinfer.engines.vllm.instance import VllmInstance  # noqa: E402
from cascadeinfer.engines.vllm.plain_request import make_plain_request  # noqa: E402
from cascadeinfer.runtime.metrics import RuntimeMetrics  # noqa: E402
from cascadeinfer.runtime.report_pace import LULL  # noqa: E402
from cascadeinfer.runtime.shell import Runtime  # noqa: E402
from cascadeinfer.runtime.supervise import SupervisionTimes  # noqa: E402
from stand_in_engines import addresses, serve  # noqa: E402

NEVER_S: Final = 600.0
SETTLING_S: Final = 4.0
PROMPT_TOKENS: Final = 64
MAX_OUTPUT_TOKENS: Final = 50_000


@dataclass(frozen=True, slots=True)
class Scene:
    """
    One way to report.

    Attributes:
        running: Requests of each instance.
        report_s, idle_report_s: See `SupervisionTimes`.
        tells_unasked: Whether the load of an instance that steps comes along with its outputs.
    """

    running: int
    report_s: float = 0.1
    idle_report_s: float = 1.0
    tells_unasked: bool = True


@dataclass(frozen=True, slots=True)
class Share:
    """CPU seconds per second; reports and tokens per second."""

    cpu: float
    reports_per_s: float
    tokens_per_s: float


def scenes(running: int) -> dict[str, Scene]:
    """What is measured, by name."""
    return {
        "idle": Scene(0),
        "idle, asked as busy ones": Scene(0, idle_report_s=0.1),
        "busy": Scene(running),
        "busy, asked": Scene(running, report_s=0.1 / LULL, tells_unasked=False),
        "busy, no reports": Scene(running, report_s=NEVER_S),
    }


def _maker_of(folder: Path, index: int) -> Callable[[int], VllmInstance]:
    attachment = Attachment(index, None, "stand-in", b"", *addresses(folder, index), "token")

    async def attach(_: AttachedCore) -> Attachment:
        return attachment

    config: Any = SimpleNamespace(cache_config=SimpleNamespace())
    return lambda _: VllmInstance(AttachedCore(str(index), config, 0, attach))


async def _know_each_other(engine: Any) -> None:
    """Skip the handshakes, of which there are thousands, at the start."""


class Tokens:
    """Reads what the runtime delivers."""

    def __init__(self, runtime: Runtime) -> None:
        """Begin."""
        self.count = 0
        self._task = asyncio.get_running_loop().create_task(self._read(runtime))

    async def _read(self, runtime: Runtime) -> None:
        while True:
            outputs = await runtime.next_outputs()
            self.count += len(outputs.outputs)

    async def end(self) -> None:
        """Read no more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def measure(policy: Policy, folder: Path, scene: Scene, options: argparse.Namespace, loads: Any) -> Share:
    """The front end's CPU share once everything has settled."""
    runtime = Runtime(
        {str(index): _maker_of(folder, index) for index in range(options.instances)},
        policy,
        lambda read: RuntimeMetrics(CollectorRegistry(), read),
        supervision=SupervisionTimes(report_s=scene.report_s, idle_report_s=max(scene.report_s, scene.idle_report_s)),
    )
    runtime.fleet.pairs.introduce = _know_each_other  # type: ignore[method-assign]
    await runtime.start()
    tokens = Tokens(runtime)
    for number in range(scene.running * options.instances):
        prompt = [3 + number % 100] * PROMPT_TOKENS
        await runtime.submit(make_plain_request(f"r{number}", prompt, MAX_OUTPUT_TOKENS))
    await asyncio.sleep(SETTLING_S)
    n_loads, n_tokens = loads.value, tokens.count
    began_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.sleep(options.seconds)
    took_s, used_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    share = Share(used_s / took_s, (loads.value - n_loads) / took_s, (tokens.count - n_tokens) / took_s)
    await tokens.end()
    await runtime.stop(0.0)
    return share


def measured(scene: Scene, options: argparse.Namespace) -> Share:
    """A scene with engines of its own."""
    layout = StageLayout.single(tuple(str(number) for number in range(options.instances)))
    policy = Cascade(layout=layout) if options.policy == "cascade" else RoundRobin()
    spawn = multiprocessing.get_context("spawn")
    loads, ready, ends = spawn.Value("q", 0, lock=False), spawn.Event(), spawn.Event()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = (folder, options.instances, options.step_s, scene.tells_unasked, loads, ready, ends)
        engines = spawn.Process(target=serve, args=arguments)
        engines.start()
        try:
            ready.wait()
            return asyncio.run(measure(policy, folder, scene, options, loads))
        finally:
            ends.set()
            engines.join()


def main() -> None:
    """Parse, run the scenes in turn, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=256)
    parser.add_argument("--running", type=int, default=4, help="requests of a busy instance")
    parser.add_argument("--step-s", type=float, default=0.2, help="of a busy instance")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured per scene and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", choices=("cascade", "round_robin"), default="cascade")
    options = parser.parse_args()
    host = measuring.machine()
    sides = scenes(options.running)
    shares: dict[str, list[Share]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, scene in sides.items():
            shares[name].append(measured(scene, options))
    results = {}
    print("| scene | reports per s | tokens per s | share of a core |")
    print("|---|---|---|---|")
    for name, taken in shares.items():
        rows = [asdict(share) for share in taken]
        results[name] = median = {field: float(np.median([row[field] for row in rows])) for field in rows[0]}
        print(f"| {name} | {median['reports_per_s']:.0f} | {median['tokens_per_s']:.0f} | {median['cpu']:.1%} |")
    print(measuring.write_results("load_reports", host, vars(options), results))


if __name__ == "__main__":
    main()
