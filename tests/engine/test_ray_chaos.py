"""
Chaos on a Ray cluster of three machines (`ray_machines.py`): what `chaos.py` does, and nodes that die or are cut off.

The clients and the rules are those of `chaos.py`: every request that its client has not abandoned ends once, with the
right tokens. The machines are network namespaces; engines, moves and Ray are real. `make chaos-ray` runs it.
"""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from chaos import Chaos, write
from ray_machines import Machines
from ray_server import RAY_ENVIRONMENT, RayServer, both_up, machines_with_ray

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]

NODES = (1, 2)
ENGINES_PER_NODE = 2
N_INSTANCES = 3
BRIEF_S = (0.5, 5.0)
"""How long a node is cut off for a moment: less than what ends a connection."""
SETTLED_S = 600.0


class ClusterChaos(Chaos):
    """See the module header."""

    actions = ("kill", "drain", "add", "kill a keeper", "cut off for a moment", "kill", "kill a node", "cut off")
    n_hostile = 0  # they speak TCP, and the server a Unix socket

    def __init__(self, server: RayServer, machines: Machines, seconds: float, seed: int) -> None:
        """See Chaos."""
        super().__init__(server, seconds, seed)
        self._machines = machines

    async def _do(self, http: httpx.AsyncClient, action: str) -> None:
        if action in {"kill", "drain", "add"}:
            await super()._do(http, action)
            return
        seen = (await http.get("/admin/instances")).json()["instances"]
        up = [instance for instance in seen if instance["phase"] == "up"]
        if len(up) < 2:
            return
        self.report.actions[action] += 1
        if action == "kill a keeper":
            keeper = psutil.Process(self._rng.choice(up)["pid"]).parent()
            assert keeper is not None
            keeper.send_signal(signal.SIGKILL)
            self._died()
        else:
            await self._do_to_a_node(action, self._rng.choice(NODES))

    async def _do_to_a_node(self, action: str, number: int) -> None:
        """What takes a while keeps nobody waiting; the next action comes when it is over."""
        if action == "cut off for a moment":
            with self._machines.unplugged(number):
                await asyncio.sleep(self._rng.uniform(*BRIEF_S))
            return
        self._died(ENGINES_PER_NODE)
        if action == "cut off":
            n_deaths = self._machines.n_deaths(number)
            with self._machines.unplugged(number):
                while self._machines.n_deaths(number) == n_deaths:  # noqa: ASYNC110 - in another process
                    await asyncio.sleep(0.5)
            self._died(ENGINES_PER_NODE)
        await asyncio.to_thread(self._machines.kill_node, number)
        await asyncio.to_thread(self._machines.start_ray, number, RAY_ENVIRONMENT)


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """How long the chaos lasts, in seconds."""
    chosen: float | None = pytestconfig.getoption("--chaos-s")
    if chosen is None:
        pytest.skip("only with --chaos-s SECONDS, as in `make chaos-ray`")
    return chosen


@pytest.fixture
def machines(
    seconds: float,  # noqa: ARG001 - first of all, whether it is to be run
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> Iterator[Machines]:
    """With Ray on each."""
    yield from machines_with_ray(tmp_path, len(NODES), pytestconfig, engines_per_node=ENGINES_PER_NODE)


@pytest.fixture
def server(machines: Machines, tiny_model: Path) -> Iterator[RayServer]:
    """A front end with three engines."""
    options = ("--instances", str(N_INSTANCES), "--stages", "0-64:1,64-:2")
    with RayServer(machines, tiny_model, "server", *options) as server:
        both_up(server, N_INSTANCES)
        yield server


def test_chaos(server: RayServer, machines: Machines, seconds: float, pytestconfig: pytest.Config) -> None:
    """Every answer is complete and right; afterwards nothing is held, and no node has an engine too many."""
    server.poll(server.idle, "idle")
    chaos = ClusterChaos(server, machines, seconds, pytestconfig.getoption("--chaos-seed"))
    try:
        report = asyncio.run(chaos.run())
    finally:
        write(pytestconfig.getoption("--chaos-report"), chaos.report.figures())
    assert report.errors == []
    assert report.requests["right"] > seconds / 10
    assert {"kill a node", "cut off", "cut off for a moment"} & report.actions.keys()

    def settled() -> bool:
        there = server.admin()["instances"]
        return len(there) >= 2 and server.idle() and engines(machines) == {instance["pid"] for instance in there}

    server.poll(settled, "all up, nothing held, no engine that nobody uses", SETTLED_S)


def engines(machines: Machines) -> set[int]:
    """The process ids of the engines on all nodes."""
    processes = [psutil.Process(pid) for number in NODES for pid in machines.pids(number)]
    return {process.pid for process in processes if "EngineCore" in " ".join([process.name(), *process.cmdline()])}
