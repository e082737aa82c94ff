"""
`--cluster ray` on three machines: a head with the front end, and two nodes with an engine each.

The machines are network namespaces of this one (`ray_machines.py`); the engines, the moves between them, and Ray are
real. The tests build on each other, in order. They are skipped without `--ray` (`make test-ray`): Ray gives its own
processes some 15 s to start, and three times as many of them on two busy cores often take longer.
"""

import os
import signal
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from ray_machines import Machines
from ray_server import READY_DEADLINE_S, both_up, machines_with_ray
from ray_server import RayServer as Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

PROMPT = list(range(3, 40))
N_TOKENS = 120
"""So many that a request moves when prompt and answer exceed the first stage."""
N_MORE = 700
NODES = (1, 2)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Machines]:
    """With Ray on each."""
    yield from machines_with_ray(tmp_path_factory.mktemp("machines"), len(NODES), pytestconfig)


@pytest.fixture(scope="module")
def first(machines: Machines, tiny_model: Path) -> Iterator[Server]:
    """A front end that has started both engines."""
    with Server(machines, tiny_model, "first") as server:
        both_up(server)
        yield server


@pytest.fixture(scope="module")
def second(machines: Machines, tiny_model: Path, first: Server) -> Iterator[Server]:
    """The first one is killed, and this one comes."""
    before = first.pids()
    os.kill(first.pid, signal.SIGKILL)
    with Server(machines, tiny_model, "second") as server:
        both_up(server)
        assert server.pids() == before, "the engines are the same"
        yield server


def assert_on_link(machines: Machines, before: dict[int, int]) -> None:
    """The KV cache of a request has passed both nodes' links: 64 tokens of 2 layers have some 10,000 bytes and more."""
    after = machines.link_bytes()
    assert all(after[number] - before[number] > 10_000 for number in NODES), (before, after)


def test_a_request_moves_between_nodes(first: Server, machines: Machines) -> None:
    """Its tokens are those of a request that stays where it is, and its KV cache is seen on the links."""
    before = machines.link_bytes()
    prompt, tokens = first.that_moved(N_TOKENS)
    assert_on_link(machines, before)
    moved = first.moved()
    stays = first.tokens(prompt + tokens[:40], N_TOKENS - 40)
    assert first.moved() == moved
    assert stays == tokens[40:]


def test_a_killed_front_end_comes_back(second: Server) -> None:
    """The engines go on; the new front end adopts them, and its requests move and say the same."""
    prompt, tokens = second.that_moved(N_TOKENS)
    assert second.tokens(prompt + tokens[:40], N_TOKENS - 40) == tokens[40:]


def test_a_drained_node_hands_over(second: Server, machines: Machines) -> None:
    """The other way: a running request leaves the second node; an instance that is added takes the free place."""
    start = PROMPT + list(range(40, 80))
    expected = second.tokens(start, N_MORE)
    moved, before = second.moved(), machines.link_bytes()
    got: list[list[int]] = []
    asking = threading.Thread(target=lambda: got.append(second.tokens(start, N_MORE)))
    asking.start()
    second.poll(lambda: second.n_running("1") == 1, "it runs on the second node")
    assert second.delete("/admin/instances/1").status_code == HTTPStatus.ACCEPTED
    asking.join()
    assert got == [expected]
    assert second.moved() == moved + 1
    assert_on_link(machines, before)
    second.poll(lambda: len(second.admin()["instances"]) == 1, "it is gone")
    added = second.post("/admin/instances", {"count": 1})
    assert added.status_code == HTTPStatus.ACCEPTED, added.text
    both_up(second)


def test_options_are_rolled_out(second: Server) -> None:
    """
    `cascadeinfer roll`: each instance is replaced on its node, the old one first, as no place is free; what runs there
    goes on elsewhere with the same tokens. A model that no node has is refused.
    """
    refused = second.post("/admin/roll", {"options": ["--model", "/no/model"], "timeout_s": 60})
    assert refused.status_code == HTTPStatus.BAD_REQUEST, refused.text
    start = PROMPT + list(range(40, 80))
    expected, before = second.tokens(start, N_MORE), second.pids()
    got: list[list[int]] = []
    asking = threading.Thread(target=lambda: got.append(second.tokens(start, N_MORE)))
    asking.start()
    begun = second.post("/admin/roll", {"options": ["--max-num-seqs", "64"], "timeout_s": 60})
    assert begun.status_code == HTTPStatus.ACCEPTED, begun.text
    asking.join()
    assert got == [expected]
    second.poll(lambda: second.get("/admin/roll").json()["state"] != "rolling", "rolled", READY_DEADLINE_S)
    rolled = second.get("/admin/roll").json()
    assert (rolled["state"], rolled["replaced"], rolled["old"]) == ("done", 2, []), rolled
    both_up(second)
    assert not set(before.values()) & set(second.pids().values())
    second.poll(second.idle, "nothing held")


def test_a_node_is_killed(second: Server, machines: Machines) -> None:
    """All its processes at once: its request goes on elsewhere, from what it had said so far."""
    start = PROMPT + list(range(40, 80))
    expected = second.tokens(start, N_MORE)
    got: list[list[int]] = []
    asking = threading.Thread(target=lambda: got.append(second.tokens(start, N_MORE)))
    asking.start()
    running: list[int] = []

    def runs() -> bool:
        running.extend(each["pid"] for each in second.admin()["instances"] if each["running"])
        return bool(running)

    second.poll(runs, "it runs")
    machines.kill_node(machines.number_of(running[0]))
    asking.join()
    assert got == [expected]
    second.poll(lambda: second.get("/health/ready").status_code == HTTPStatus.OK, "it serves on")
