"""A real server under kills, drains, adds and impatient clients; `make chaos` runs it for five minutes."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import Chaos, write
from server_process import QUICK_SERVER, ServerProcess

pytestmark = pytest.mark.engine

N_INSTANCES = 3
FEW_CONNECTIONS = 6
"""Connections kept open by this test's own HTTP client."""


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long the chaos lasts, in seconds."""
    chosen: float | None = request.config.getoption("--chaos-s")
    if chosen is None:
        pytest.skip("only with --chaos-s SECONDS, as in `make chaos`")
    return chosen


@pytest.fixture
def server(
    seconds: float,  # noqa: ARG001 - first of all, whether it is to be run
    tiny_model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[ServerProcess]:
    """A private server whose instances start quickly."""
    stages: str = request.config.getoption("--chaos-stages")
    options = ("--instances", str(N_INSTANCES), "--stages", stages, "--distributed-executor-backend", "uni")
    with ServerProcess(tiny_model, tmp_path / "log", *options, program=QUICK_SERVER) as server:
        server.wait_until_ready(N_INSTANCES)
        yield server


@pytest.mark.timeout(1500)
def test_chaos(server: ServerProcess, seconds: float, request: pytest.FixtureRequest) -> None:
    """Every answer is complete and right; afterwards no instance holds anything, and the server has leaked nothing."""
    server.poll(server.idle, "idle")
    before, open_before = server.resources(), server.open_files()
    chaos = Chaos(server, seconds, request.config.getoption("--chaos-seed"))
    path: str | None = request.config.getoption("--chaos-report")
    try:
        report = asyncio.run(chaos.run())
    finally:
        write(path, chaos.report.figures())
    assert report.errors == []
    assert report.requests["right"] > seconds / 10
    assert sum(n for action, n in report.actions.items() if "kill" in action) > seconds / 30

    server.poll(server.idle, "all up and nothing held", 120)
    there = server.admin()["instances"]
    for instance in there[N_INSTANCES:]:
        assert server.delete(f"/admin/instances/{instance['id']}").status_code == 202
    for _ in range(N_INSTANCES - len(there)):
        assert server.post("/admin/instances", {}).status_code == 202
    server.poll(lambda: len(server.admin()["instances"]) == N_INSTANCES and server.idle(), "as many as before", 120)
    # An instance killed while it starts may leave behind the shared memory it has just created.
    n_maybe_starting = report.actions["kill, any process"] + report.actions["drain, starting"]
    slack = {"files": FEW_CONNECTIONS, "shared memory": n_maybe_starting}
    try:
        server.poll(lambda: not more(server.resources(), before, slack), "no more than before", 20)
    except AssertionError:
        left = server.open_files() - open_before
        pytest.fail(f"more than before: {more(server.resources(), before, slack)}; files: {dict(left)}")
    write(path, {**report.figures(), "more_than_before": more(server.resources(), before, {})})


def more(now: dict[str, int], before: dict[str, int], slack: dict[str, int]) -> dict[str, int]:
    """How far each count grew, for those that grew by more than their slack, however many instances died."""
    return {name: count - before[name] for name, count in now.items() if count > before[name] + slack.get(name, 0)}
