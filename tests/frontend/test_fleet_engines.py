"""Which engines a server starts besides those of its fleet that it finds alive, and what the record says of them."""

from dataclasses import replace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.ray_link import SideLostError
from cascadeinfer.core.errors import CascadeError, ConfigError, ScalingRefusedError
from cascadeinfer.frontend.fleet_engines import FleetTerms, check_nodes, has_room, missing, record_of, updated

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
    assert updated(asked, after, "") == wanted
    assert updated(asked, before, "") == asked
    assert updated(asked, after, "two kinds").differences(wanted) == [
        "a rolling update of them was not finished (two kinds)"
    ]


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
