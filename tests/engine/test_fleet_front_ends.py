"""
A fleet that is used by a server with several front-end processes: `--fleet NAME --api-servers 2`.

Real engines, started as an operator starts them, on this machine. The tests build on each other, in this order.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from server_process import ServerProcess
from test_api_servers import N_REQUESTS, N_TOKENS, N_TRIES, complete, many, wait_until_all_serve
from test_fleet_live import READY_DEADLINE_S, STOP_DEADLINE_S, Fleet, is_running, pids, wait_until_ready
from test_standing_live import moved, n_there, text_that_moved

from cascadeinfer.cluster.knocking import HEARTBEAT_TIMEOUT_MS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

TWO_PROCESSES = ("--api-servers", "2")


@pytest.fixture(scope="module")
def fleet(tiny_model: Path) -> Iterator[Fleet]:
    """None of its engines is left at the end."""
    with tempfile.TemporaryDirectory(prefix="cf") as folder:
        fleet = Fleet(tiny_model, Path(folder))
        yield fleet
        fleet.stop()


@pytest.fixture(scope="module")
def first(fleet: Fleet) -> Iterator[ServerProcess]:
    """The server that starts the engines; killed by one of the tests."""
    with fleet.server(*TWO_PROCESSES) as server:
        wait_until_ready(server)
        wait_until_all_serve(server)
        yield server


def texts_through_both(server: ServerProcess) -> set[str | None]:
    """What requests to both processes are answered, at the same time."""
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        return {future.result() for future in many(server, executor, N_TOKENS)}


def front_end_pids(server: ServerProcess) -> list[int]:
    """Of all front-end processes, process 0 first."""
    return [one["pid"] for one in server.admin()["front_ends"]]


def test_requests_through_both_say_the_same(first: ServerProcess) -> None:
    """Both processes are clients of the same engines, between which their requests move, with the text of one alone."""
    alone, text = complete(first), text_that_moved(first, 120)
    for _ in range(N_TRIES):  # on a busy machine, few requests move before they end
        before = moved(first)
        assert texts_through_both(first) == {alone}
        first.poll(first.idle, "idle")
        if moved(first) > before:
            break
    else:
        pytest.fail("no request has moved")
    assert text_that_moved(first, 120) == text
    for _ in range(4):  # whichever process answers
        assert first.metric("cascadeinfer_instance_up") == 2


def test_an_engine_dies_under_both(first: ServerProcess) -> None:
    """Requests of both processes complete elsewhere; both attach to the engine that is started in its place."""
    alone, before = complete(first), pids(first)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(first, executor, N_TOKENS)
        os.kill(before[1], signal.SIGKILL)
        assert {future.result() for future in futures} == {alone}
    first.poll(first.idle, "idle", READY_DEADLINE_S)
    assert pids(first)[0] == before[0]
    assert pids(first)[1] != before[1]
    assert texts_through_both(first) == {alone}


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_is_paused(first: ServerProcess, process: int) -> None:
    """
    For so long that the engines leave it: it attaches to the same ones again, and no request fails. While process 0 is
    away, so are the engines for all; they are not restarted.
    """
    alone, engines, front_ends = complete(first), pids(first), front_end_pids(first)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(first, executor, N_TOKENS)
        os.kill(front_ends[process], signal.SIGSTOP)
        try:
            time.sleep(HEARTBEAT_TIMEOUT_MS / 1000 + 5.0)
        finally:
            os.kill(front_ends[process], signal.SIGCONT)
        assert {future.result() for future in futures} == {alone}
    first.poll(first.idle, "nothing held")
    assert texts_through_both(first) == {alone}
    assert (pids(first), front_end_pids(first)) == (engines, front_ends)


def test_a_follower_dies(first: ServerProcess) -> None:
    """The engines notice by themselves and abort its requests; others go on, and a new process takes its place."""
    alone, engines = complete(first), pids(first)
    with ThreadPoolExecutor(N_REQUESTS) as executor:
        futures = many(first, executor, N_TOKENS)
        os.kill(front_end_pids(first)[1], signal.SIGKILL)
        assert {future.result() for future in futures} == {None, alone}
    wait_until_all_serve(first, restarts=1)
    first.poll(first.idle, "nothing held")
    assert texts_through_both(first) == {alone}
    assert pids(first) == engines


def test_a_killed_server_costs_no_engine(fleet: Fleet, first: ServerProcess) -> None:
    """
    `kill -9` of process 0 under requests of both processes: all front ends end, the engines abort what these had there
    and go on. A server that stood by takes over port and engines; `cascadeinfer stop` ends all its processes and them.
    """
    alone, engines = complete(first), pids(first)
    front_ends = [psutil.Process(pid) for pid in front_end_pids(first)]
    taking_over = fleet.server(*TWO_PROCESSES, "--standby", "--port", str(first.port))
    taking_over.port = first.port
    with taking_over as standby:
        standby.wait_until(lambda: "waits for the end" in standby.log_tail(), "waiting", READY_DEADLINE_S)
        with ThreadPoolExecutor(N_REQUESTS) as executor:
            futures = many(first, executor, N_TOKENS)
            first.send_signal(signal.SIGKILL)
            assert None in {future.result() for future in futures}
        first.wait_ended(STOP_DEADLINE_S)
        standby.wait_until(lambda: not any(map(is_running, front_ends)), "no front end is left", STOP_DEADLINE_S)

        wait_until_ready(standby)
        wait_until_all_serve(standby)
        assert pids(standby) == engines
        standby.poll(lambda: n_there(standby) == 0, "nothing runs")
        standby.poll(standby.idle, "nothing held")
        assert texts_through_both(standby) == {alone}

        processes = [psutil.Process(pid) for pid in [*engines, *front_end_pids(standby)]]
        ended = fleet.stop()
        assert ended.returncode == 0, ended.stderr
        assert "2 engines stopped" in ended.stdout
        assert standby.wait_ended(STOP_DEADLINE_S) == 0
    assert [process for process in processes if is_running(process)] == []
    assert "Traceback" not in standby.log_tail(n_lines=10_000), standby.log_tail()
