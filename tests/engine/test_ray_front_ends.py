"""
`--cluster ray --api-servers 2` on three machines: a head with two front-end processes, and two nodes with an engine
each.

See `test_ray.py`; these tests build on each other, too, and are skipped without `--ray` (`make test-ray`).
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray_machines import Machines
from ray_server import RayServer as Server
from ray_server import both_up, machines_with_ray
from test_api_servers import N_REQUESTS, N_TOKENS, complete, many, wait_until_all_serve

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

N_NODES = 2
TWO_PROCESSES = ("--api-servers", "2")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Machines]:
    """With Ray on each."""
    yield from machines_with_ray(tmp_path_factory.mktemp("machines"), N_NODES, pytestconfig)


@pytest.fixture(scope="module")
def first(machines: Machines, tiny_model: Path) -> Iterator[Server]:
    """Two front-end processes, which have started both engines; process 0 is killed by one of the tests."""
    with Server(machines, tiny_model, "first", *TWO_PROCESSES) as server:
        both_up(server)
        wait_until_all_serve(server)
        yield server


def test_a_follower_dies(first: Server) -> None:
    """Requests through both say the same; the engines elsewhere notice the death and hold nothing of it."""
    alone = complete(first)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        assert {future.result() for future in many(first, executor, N_TOKENS)} == {alone}
        futures = many(first, executor, N_TOKENS)
        os.kill(first.admin()["front_ends"][1]["pid"], signal.SIGKILL)
        assert {future.result() for future in futures} == {None, alone}
    wait_until_all_serve(first, restarts=1)
    first.poll(first.idle, "nothing held")


def test_all_die(first: Server, machines: Machines, tiny_model: Path) -> None:
    """`kill -9` of process 0 under requests of both: the next server adopts the engines, which hold nothing."""
    alone, engines = complete(first), first.pids()
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(first, executor, N_TOKENS)
        os.kill(first.admin()["front_ends"][0]["pid"], signal.SIGKILL)
        assert None in {future.result() for future in futures}
    with Server(machines, tiny_model, "second", *TWO_PROCESSES) as second:
        both_up(second)
        wait_until_all_serve(second)
        assert second.pids() == engines
        second.poll(second.idle, "nothing held")
        with ThreadPoolExecutor(N_REQUESTS) as executor:
            assert {future.result() for future in many(second, executor, N_TOKENS)} == {alone}
