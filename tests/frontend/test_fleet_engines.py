"""Which engines a server starts besides those of its fleet that it finds alive, and what the record says of them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.fleet import Record, Update
from cascadeinfer.cluster.knocking import KeyRefusedError
from cascadeinfer.cluster.ray_link import SideLostError
from cascadeinfer.core.errors import CascadeError, ConfigError, EngineError, ScalingRefusedError
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.frontend import fleet_engines
from cascadeinfer.frontend.fleet_engines import (
    FleetTerms,
    _left_by_an_update,
    check_nodes,
    has_room,
    missing,
    record_of,
    updated,
)

TERMS = FleetTerms(2, 10, 600.0, log_stats=True, own_log_level="INFO")


@pytest.mark.parametrize(
    ("n_instances", "found", "started"),
    [
        (2, (), ["0", "1"]),
        (2, ("1",), ["0"]),
        (3, ("0", "1"), ["2"]),
        (2, ("2", "3"), []),
        (2, ("0", "1", "2"), []),
        (3, ("1", "5"), ["0"]),
    ],
)
def test_as_many_as_asked_for_whatever_their_names(
    n_instances: int, found: tuple[str, ...], started: list[str]
) -> None:
    """After adds, drains and updates, those that live have other numbers than those of a start."""
    assert missing(n_instances, found) == started


def test_the_record_after_an_update_is_that_of_a_start_with_the_new_options() -> None:
    """
    Whatever making a configuration has completed in the arguments meanwhile; back at the old options, the record is the
    old one.
    """
    before = AsyncEngineArgs(model="a/model", max_num_seqs=4, dtype="float32")
    asked = record_of(before, TERMS)
    after = replace(before, model="b/model", max_num_seqs=None, enforce_eager=True)
    wanted = record_of(AsyncEngineArgs(model="b/model", dtype="float32", enforce_eager=True), TERMS)
    after.profiler_config.active_iterations += 1  # as vLLM does
    assert record_of(after, TERMS) != wanted
    assert updated(asked, after, ()) == wanted
    assert updated(asked, before, ()) == asked


class Left:
    """A fleet with engines that an unfinished update has left, and its keepers."""

    name, stop_command = "f", "cascadeinfer stop f"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, marks: dict[str, str | None]) -> None:
        """Engines with these marks; None: it does not answer; "ended": it has."""
        self._marks = marks
        monkeypatch.setattr(fleet_engines, "look_at", self.look_at)

    async def ready(self, instance_id: str) -> str:
        """See Keepers."""
        if self._marks[instance_id] == "ended":
            raise EngineError("has ended", instance_id=instance_id)
        return instance_id

    async def look_at(self, instance_id: str, _: object) -> Any:
        """What it says of itself."""
        mark = self._marks[instance_id]
        if mark == "has another key":
            raise KeyRefusedError(mark)
        return None if mark is None else SimpleNamespace(mark=mark)


class Marks:
    """The builds of a server, by the marks "own" and "new"."""

    own_mark = "own"

    def of_marks(self, updates: Any) -> dict[str, Build]:
        """See KeptBuilds."""
        return {"own": FIRST_BUILD, **{update.mark: Build(1, update.words) for update in updates}}


async def left(monkeypatch: pytest.MonkeyPatch, marks: dict[str, str | None], model: str = "m") -> Any:
    """What a server that asks for this model goes on with."""
    fleet: Any = Left(monkeypatch, marks)
    builds: Any = Marks()
    runs = Record("1", "2", "m", {}, (Update(("--max-num-seqs 8",), "new"),))
    key: Any = None
    return await _left_by_an_update(fleet, fleet, tuple(marks), builds, runs, Record("1", "2", model, {}), key)


async def test_engines_that_an_unfinished_update_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with other options are known by their marks; one that has ended is started with this server's options."""
    new = Build(1, ("--max-num-seqs 8",))
    assert await left(monkeypatch, {"0": "own", "2": "new", "3": "ended"}) == {"2": new}
    assert await left(monkeypatch, {"2": "new", "3": "new"}) == {"2": new, "3": new}
    assert await left(monkeypatch, {"0": "own"}, model="another, which all that are left have") == {}


@pytest.mark.parametrize(
    ("marks", "model", "error"),
    [
        ({"0": "own", "2": "new"}, "n", "differs from the options before: the model is m, not n"),
        ({"0": "own", "2": "has another key"}, "m", "instance 2 does not answer"),
        ({"0": "own", "2": "unheard of", "3": None}, "m", "instance 2, 3 does not answer or has options"),
    ],
)
async def test_what_no_server_can_go_on_with(
    monkeypatch: pytest.MonkeyPatch, marks: dict[str, str | None], model: str, error: str
) -> None:
    """One line says why, and how to end the engines."""
    with pytest.raises(ConfigError, match=error) as refused:
        await left(monkeypatch, marks, model)
    assert "the options before and --max-num-seqs 8" in str(refused.value)
    assert "cascadeinfer stop f" in str(refused.value)


class Nodes:
    """A fleet elsewhere, with room for some engines of one model."""

    def __init__(self, room: int, model: str) -> None:
        """They can be asked, until `error` is set."""
        self._room, self._model = room, model
        self.error: CascadeError | None = None

    async def check(self, n_instances: int, model: str) -> list[str]:
        """See UsedFleet."""
        if self.error is not None:
            raise self.error
        if n_instances > self._room:
            raise ConfigError(f"there is room for {self._room}")
        if model != self._model:
            raise ConfigError(f"there is no {model}")
        return ["its host name cannot be looked up"]


async def test_room_on_other_machines() -> None:
    """Its nodes say so; a model that they lack is an error before anything is touched, room or not."""
    full: Any = Nodes(0, "m")
    free: Any = Nodes(1, "m")
    assert await has_room(free, None, "m", shared=False)
    assert not await has_room(full, None, "m", shared=True)
    await check_nodes(full, "m")
    with pytest.raises(ConfigError, match="there is no n"):
        await check_nodes(full, "n")
    free.error = SideLostError("Ray cannot be reached")
    for asked in (has_room(free, None, "m", shared=False), check_nodes(free, "m")):
        with pytest.raises(ScalingRefusedError, match="Ray cannot be reached"):
            await asked
