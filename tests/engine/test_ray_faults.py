"""
What a stream sees when a part of a Ray cluster fails, and what is there again afterwards.

The machines are those of `ray_machines.py`, with real engines, real moves and a real Ray. Each test lets one thing fail
while a request runs where it hurts, and asserts that the client gets every token, none of them wrong, and that both
instances serve again. `--ray-report FILE` writes what the client saw: the longest gap between two tokens, over the
median one. The tests build on each other, in order; the last one leaves a cluster without a head.
"""

import functools
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_machines import Machines
from ray_server import RAY_ENVIRONMENT, RayServer, both_up, machines_with_ray

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

NODES = (1, 2)
LONG = list(range(90, 10, -1))
"""A prompt of the last stage: it runs on its one instance from the beginning."""
SHORT = list(range(3, 40))
"""It moves once, when prompt and answer exceed the first stage."""
N_TOKENS = 3000
LONGER = ("--max-model-len", "4096")
WAITS = "waits for the end"
N_SHORT = 120
N_BEFORE = 60
"""Tokens that come before something fails."""
BRIEF_S = 4.0
"""Shorter than any time-out that ends a connection."""


class Report:
    """The figures, by what failed."""

    def __init__(self, path: str | None) -> None:
        """They go to this file, if there is one."""
        self._path = path
        self.faults: dict[str, dict[str, float]] = {}

    def add(self, fault: str, figures: dict[str, float]) -> None:
        """Write them at once: a later test may fail."""
        self.faults[fault] = {name: round(figure, 2) for name, figure in figures.items()}
        if self._path is not None:
            Path(self._path).write_text(json.dumps(self.faults, indent=2) + "\n")


class Stream(threading.Thread):
    """
    A request whose tokens are timed.

    Attributes:
        tokens: Those that have come.
        came_s: When, on the monotonic clock.
        error: What broke it off.
    """

    def __init__(self, server: RayServer, prompt: list[int], n_tokens: int) -> None:
        """It begins at once."""
        super().__init__()
        self._asked = (server, prompt, n_tokens)
        self.tokens: list[int] = []
        self.came_s: list[float] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Read."""
        server, prompt, n_tokens = self._asked
        try:
            for token in server.stream(prompt, n_tokens):
                self.came_s.append(time.monotonic())
                self.tokens.append(token)
        except BaseException as error:
            self.error = error
            raise

    def answer(self) -> list[int]:
        """All tokens, once it has ended."""
        self.join()
        assert self.error is None, self.error
        return self.tokens

    def figures(self) -> dict[str, float]:
        """The longest gap in seconds and over the median one."""
        gaps_s = [later - earlier for earlier, later in zip(self.came_s, self.came_s[1:], strict=False)]
        # Tokens of one message come at the same time.
        usual_s = statistics.median(gap_s for gap_s in gaps_s if gap_s > 1e-4)
        return {"longest_gap_s": max(gaps_s), "over_median_gap": max(gaps_s) / usual_s}


@pytest.fixture(scope="module")
def report(pytestconfig: pytest.Config) -> Report:
    """See Report."""
    return Report(pytestconfig.getoption("--ray-report"))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Machines]:
    """With Ray on each."""
    yield from machines_with_ray(tmp_path_factory.mktemp("faults"), len(NODES), pytestconfig)


@pytest.fixture(scope="module")
def server(machines: Machines, tiny_model: Path, report: Report) -> Iterator[RayServer]:
    """A front end with both engines; how long they took to start is the measure for what a front end takes."""
    began_s = time.monotonic()
    with RayServer(machines, tiny_model, "first", *LONGER) as server:
        both_up(server)
        report.add("start from nothing", {"ready_s": time.monotonic() - began_s})
        yield server


def where(server: RayServer) -> str:
    """The instance on which the only request runs."""
    found: list[str] = []

    def runs() -> bool:
        found.extend(each["id"] for each in server.admin()["instances"] if each["running"])
        return bool(found)

    server.poll(runs, "it runs")
    [instance] = found
    return instance


def suffers(server: RayServer, fault: Callable[[str], Any]) -> Stream:
    """
    Let something fail under a running request.

    Args:
        server: Idle, with both instances.
        fault: Called with the request's instance, and undone by the time it returns, or by nobody.

    Returns:
        What the client got: every token, and the right ones.
    """
    stream = Stream(server, LONG, N_TOKENS)
    server.poll(lambda: len(stream.tokens) >= N_BEFORE or not stream.is_alive(), "it has begun")
    assert stream.is_alive(), (stream.error, len(stream.tokens))
    fault(where(server))
    assert stream.answer() == expected_of(server)
    return stream


@functools.cache
def expected_of(server: RayServer) -> list[int]:
    """The tokens of the request that suffers, from an engine that nothing happens to."""
    return server.tokens(LONG, N_TOKENS)


def all_is_well(server: RayServer) -> float:
    """Wait until both instances serve and nothing is held, and return how many seconds that took."""
    began_s = time.monotonic()
    both_up(server)
    server.poll(server.idle, "nothing held")
    assert server.tokens(SHORT, N_SHORT) == server.tokens(SHORT, N_SHORT)
    return time.monotonic() - began_s


def kill(process: psutil.Process) -> None:
    """With SIGKILL."""
    process.send_signal(signal.SIGKILL)


def test_an_engine_is_killed(server: RayServer, report: Report) -> None:
    """Its keeper tells, and the request goes on elsewhere."""
    stream = suffers(server, lambda instance: os.kill(server.pids()[instance], signal.SIGKILL))
    report.add("engine killed", {**stream.figures(), "both_up_after_s": all_is_well(server)})


def test_a_keeper_is_killed(server: RayServer, report: Report) -> None:
    """Its engine ends with it."""

    def fault(instance: str) -> None:
        engine = psutil.Process(server.pids()[instance])
        keeper = engine.parent()
        assert keeper is not None
        kill(keeper)
        psutil.wait_procs([engine], timeout=60.0)
        assert not engine.is_running()

    stream = suffers(server, fault)
    report.add("keeper killed", {**stream.figures(), "both_up_after_s": all_is_well(server)})


def test_a_node_is_unreachable_for_a_moment(server: RayServer, machines: Machines, report: Report) -> None:
    """Nothing is declared dead: the engines are the same afterwards, and no token comes twice."""
    before = server.pids()

    def fault(instance: str) -> None:
        with machines.unplugged(machines.number_of(server.pids()[instance])):
            time.sleep(BRIEF_S)

    stream = suffers(server, fault)
    well_s = all_is_well(server)
    assert server.pids() == before
    report.add(f"node unreachable for {BRIEF_S:g} s", {**stream.figures(), "both_up_after_s": well_s})


def test_two_nodes_cannot_reach_each_other(server: RayServer, machines: Machines, report: Report) -> None:
    """
    A pull hangs, and its request goes on all the same; the next one stays where it is, without a pause. Once the nodes
    reach each other again, requests move again.
    """
    prompt, tokens = server.that_moved(N_SHORT)
    expected = prompt + tokens
    moved = server.moved()
    with machines.apart(*NODES):
        # The prompts differ from what either instance remembers: they begin in the first stage.
        found_out, stays = [Stream(server, expected[first : first + 37], N_SHORT) for first in (1, 2)], []
        for stream in found_out:
            stream.answer()
        for first in (3, 4):
            stays.append(Stream(server, expected[first : first + 37], N_SHORT))
            stays[-1].answer()
        assert server.moved() == moved
        assert server.admin()["broken_pairs"]
    longest = max(found_out, key=lambda stream: stream.figures()["longest_gap_s"])
    report.add("nodes cannot reach each other", longest.figures())
    report.add("nodes cannot reach each other, the next request", stays[-1].figures())
    server.poll(lambda: not server.admin()["broken_pairs"], "they reach each other")
    assert [server.tokens(expected[first : first + 37], N_SHORT) for first in (1, 2, 3, 4)] == [
        stream.tokens for stream in (*found_out, *stays)
    ]
    server.that_moved(N_SHORT)
    all_is_well(server)


def test_a_raylet_is_killed(server: RayServer, machines: Machines, report: Report) -> None:
    """Ray's own process on a node: its engine ends too, and comes back when Ray is there again."""

    def fault(instance: str) -> None:
        number = machines.number_of(server.pids()[instance])
        kill(machines.process(number, "raylet"))
        lost.append(number)

    lost: list[int] = []
    stream = suffers(server, fault)
    machines.kill_node(lost[0])
    machines.start_ray(lost[0], RAY_ENVIRONMENT)
    report.add("raylet killed, then started", {**stream.figures(), "both_up_after_s": all_is_well(server)})


def test_each_node_is_killed(server: RayServer, machines: Machines, report: Report) -> None:
    """
    All its processes at once; its instance is started when Ray is there again. One of the nodes had the fleet's record,
    which outlives it.
    """

    def fault(instance: str) -> None:
        lost.append(machines.number_of(server.pids()[instance]))
        machines.kill_node(lost[0])

    lost: list[int] = []
    stream = suffers(server, fault)
    machines.start_ray(lost[0], RAY_ENVIRONMENT)
    report.add("node killed, then started", {**stream.figures(), "both_up_after_s": all_is_well(server)})
    [other] = set(NODES) - set(lost)
    machines.kill_node(other)
    machines.start_ray(other, RAY_ENVIRONMENT)
    all_is_well(server)


def test_a_node_is_unreachable(server: RayServer, machines: Machines, report: Report) -> None:
    """So long that it counts as dead; when it can be reached again, what runs there ends by itself."""

    def fault(instance: str) -> None:
        number = machines.number_of(server.pids()[instance])
        engine = psutil.Process(server.pids()[instance])
        lost.append(number)
        n_deaths = machines.n_deaths(number)
        with machines.unplugged(number):
            server.poll(lambda: machines.n_deaths(number) > n_deaths, "Ray has given it up", 120.0)
        psutil.wait_procs([engine], timeout=120.0)
        assert not engine.is_running()

    lost: list[int] = []
    stream = suffers(server, fault)
    machines.kill_node(lost[0])
    machines.start_ray(lost[0], RAY_ENVIRONMENT)
    report.add("node unreachable, then started", {**stream.figures(), "both_up_after_s": all_is_well(server)})


@pytest.fixture(scope="module")
def second(machines: Machines, tiny_model: Path, server: RayServer, report: Report) -> Iterator[RayServer]:
    """A front end that stands by when the first one is killed."""
    before = server.pids()
    with RayServer(machines, tiny_model, "second", *LONGER, "--standby") as standby:
        standby.wait_until(lambda: WAITS in standby.log.read_text(), "it stands by", 300.0)
        os.kill(server.pid, signal.SIGKILL)
        began_s = time.monotonic()
        both_up(standby)
        report.add("front end killed, one stands by", {"both_up_after_s": time.monotonic() - began_s})
        assert standby.pids() == before
        yield standby


def test_the_front_end_is_killed(second: RayServer) -> None:
    """The engines go on, and requests run and move as before."""
    second.poll(second.idle, "nothing held")
    prompt, tokens = second.that_moved(N_SHORT)
    assert second.tokens(prompt + tokens[:40], N_SHORT - 40) == tokens[40:]
    assert second.tokens(LONG, N_TOKENS)[:10] == second.tokens(LONG, 10)


def test_the_head_is_gone(second: RayServer, machines: Machines, report: Report) -> None:
    """Requests are served and move as before; nothing can be started."""
    kill(machines.process(0, "gcs_server"))
    prompt, tokens = second.that_moved(N_SHORT)
    stream = suffers(second, lambda instance: os.kill(second.pids()[instance], signal.SIGKILL))
    report.add("engine killed without a head", stream.figures())
    assert second.tokens(prompt, N_SHORT) == tokens
    [left] = second.get("/health/ready").json()["instances"]
    second.poll(lambda: second.n_running(left) == 0, "nothing runs")
