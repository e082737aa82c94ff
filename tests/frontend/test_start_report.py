"""What a start says: each change once, several instances in one line, no silent minute, and at its end where it is."""

import asyncio
from types import SimpleNamespace
from typing import Any

from cascadeinfer import __version__
from cascadeinfer.core.layout import Stage, StageLayout
from cascadeinfer.core.types import LengthRange
from cascadeinfer.frontend.start_report import SILENCE_S, StartReport, doing, first_line, ready_lines, reported
from cascadeinfer.runtime.instance_state import State
from support.virtual_time import virtual_time


def test_changes_are_said_once() -> None:
    """Instances that do the same share a line, and nothing is repeated."""
    report = StartReport(10.0)
    assert list(report.lines({"0": "loading", "1": "loading"}, 10.0)) == ["instances 0, 1: loading (0 s)"]
    assert list(report.lines({"0": "loading", "1": "loading"}, 11.0)) == []
    assert list(report.lines({"0": "up", "1": "loading"}, 15.4)) == ["instance 0: up (5 s)"]
    assert list(report.lines({"0": "up", "1": "up"}, 16.0)) == ["instance 1: up (6 s)"]


def test_there_is_no_silent_minute() -> None:
    """Whatever takes long is named again after a while."""
    report = StartReport(0.0)
    assert list(report.lines({"0": "compiling"}, 0.0))
    assert list(report.lines({"0": "compiling"}, SILENCE_S - 1)) == []
    assert list(report.lines({"0": "compiling"}, SILENCE_S)) == [f"instance 0: still compiling ({SILENCE_S:.0f} s)"]
    assert list(report.lines({"0": "compiling"}, SILENCE_S + 1)) == []


def instance(instance_id: str, state: State) -> Any:
    """An instance in this state, as far as the report looks."""
    return SimpleNamespace(instance_id=instance_id, life=SimpleNamespace(state=state))


def test_what_instances_do() -> None:
    """During its processes' start an instance's own word counts, if there is one; afterwards its state."""
    states = (State.STARTING, State.STARTING, State.JOINING, State.UP, State.ADDED)
    fleet = [instance(str(i), state) for i, state in enumerate(states)]
    words = {"0": "loading the model", "2": "loading the model", "3": "loading the model"}
    assert doing(fleet, words.get) == {
        "0": "loading the model", "1": "starting", "2": "connecting to the others", "3": "up"
    }  # fmt: skip


@virtual_time
async def test_a_start_is_followed_to_its_end() -> None:
    """Lines come while it goes on, the last state is said, and nothing runs afterwards."""
    one = instance("0", State.STARTING)
    said: list[str] = []
    async with reported([one], {"0": "loading the model"}.get, said.append):
        await asyncio.sleep(3.0)
        one.life.state = State.UP
    assert [line.partition(" (")[0] for line in said] == ["instance 0: loading the model", "instance 0: up"]


def test_first_and_last_lines() -> None:
    """Who starts what; then URL, model, policy and stages."""
    first = first_line("org/model", 2, 3, "local")
    assert f"cascadeinfer {__version__}" in first
    assert "2 instances of org/model, 3 front-end processes" in first
    assert "looks for engines of org/model" in first_line("org/model", 2, 1, "static")
    layout = StageLayout((Stage(LengthRange(0, 64), ("0",)), Stage(LengthRange(64), ("1", "2"))))
    url, what = ready_lines("http://127.0.0.1:8000", "m", "static_stages", layout, 3)
    assert url == "ready: http://127.0.0.1:8000"
    assert what == "serving m on 3 instances, policy static_stages, stages 0-64: 1 instance, 64-: 2 instances"
    assert ready_lines("u", "m", "cascade", StageLayout.single(("0",)), 1)[1].endswith("policy cascade, one stage")
