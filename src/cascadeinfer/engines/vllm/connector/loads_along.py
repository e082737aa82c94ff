"""
Load reports that nobody has asked for: they travel with the outputs of a step.

A front end that has asked for the load once, and said how often it wants it, is sent it from then on while the engine
steps: inside the next message of outputs for it after so many seconds, or, while only other front ends have requests
here, in a message of its own. (vLLM's scheduler can add what a connector says to its statistics, but sends those to one
of several front ends only, and to none where statistics are off; docs/decisions/0016-reports-with-outputs.md.)

The load travels in `SchedulerStats.kv_connector_stats`, under `LOAD`. What vLLM's front end reads there is put back by
`take_load` before it sees the outputs.

Everything runs in the EngineCore's thread, except that vLLM's other threads put outputs too; these get no load.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

logger = logging.getLogger(__name__)

LOAD: Final = "cascade_load"
"""The key of a load among a connector's statistics."""
PATIENCE: Final = 2.0
"""Intervals after which a load no longer waits for outputs of its front end's own: its requests may be waiting, too."""
ALONE: Final = "cascade_alone"
"""The key that says: without the load, there would be no statistics."""


class OutputQueue(Protocol):
    """What an EngineCore does with its queue of outputs."""

    def put_nowait(self, item: Any) -> None:
        """Outputs with the number of their client, or vLLM's word that the EngineCore is dead."""
        ...

    def get(self) -> Any:
        """For vLLM's output thread."""
        ...


@dataclass(slots=True)
class _Wish:
    """A front end wants the load every so many seconds; when it was told last."""

    every_s: float
    told_s: float


class LoadsAlong:
    """In place of the EngineCore's output queue: adds the load to outputs on their way. See the module header."""

    def __init__(
        self,
        outputs: "OutputQueue | queue.Queue[Any]",
        load_of: Callable[[int], dict[str, Any]],
        has_requests: Callable[[int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            outputs: The queue; this is its only writer from now on.
            load_of: The load as a client sees it, by the client's number.
            has_requests: Whether a client has requests here.
            clock: Seconds.
        """
        self._outputs = outputs
        self._load_of = load_of
        self._has_requests = has_requests
        self._clock = clock
        self._wishes: dict[int, _Wish] = {}
        self._thread = threading.get_ident()

    def told(self, client: int, next_after_s: float | None) -> None:
        """A client has asked and is being answered; None: what it wanted before stays."""
        if next_after_s is not None:
            self._wishes[client] = _Wish(next_after_s, self._clock())
        elif (wish := self._wishes.get(client)) is not None:
            wish.told_s = self._clock()

    def forget(self, client: int) -> None:
        """A client is gone."""
        self._wishes.pop(client, None)

    def put_nowait(self, item: Any) -> None:
        """See OutputQueue."""
        if self._wishes and not isinstance(item, bytes) and item[1].outputs and threading.get_ident() == self._thread:
            try:
                self._add_loads(*item)
            except Exception:  # a report must not end the engine; front ends ask when none comes
                logger.exception("internal error: no load comes along with outputs any more")
                self._wishes.clear()
        self._outputs.put_nowait(item)

    def get(self) -> Any:
        """See OutputQueue."""
        return self._outputs.get()

    def _add_loads(self, receiver: int, outputs: EngineCoreOutputs) -> None:
        now_s = self._clock()
        for client, wish in self._wishes.items():
            waited_s = now_s - wish.told_s
            if waited_s < wish.every_s:
                continue
            if client == receiver:
                _add_load(outputs, self._load_of(client))
            elif waited_s < PATIENCE * wish.every_s and self._has_requests(client):
                continue  # its own outputs may be next
            else:
                alone = EngineCoreOutputs()
                _add_load(alone, self._load_of(client))
                self._outputs.put_nowait((client, alone))
            wish.told_s = now_s


def _add_load(outputs: EngineCoreOutputs, load: dict[str, Any]) -> None:
    if outputs.scheduler_stats is None:
        outputs.scheduler_stats = SchedulerStats(kv_connector_stats={ALONE: True, LOAD: load})
    else:
        outputs.scheduler_stats.kv_connector_stats = {**(outputs.scheduler_stats.kv_connector_stats or {}), LOAD: load}


def take_load(outputs: EngineCoreOutputs) -> dict[str, Any] | None:
    """Remove the load from outputs at their receiver, so that they are as vLLM made them; None: there is none."""
    stats = outputs.scheduler_stats
    if stats is None or not stats.kv_connector_stats or LOAD not in stats.kv_connector_stats:
        return None
    load: dict[str, Any] = stats.kv_connector_stats.pop(LOAD)
    if stats.kv_connector_stats.pop(ALONE, False):
        outputs.scheduler_stats = None
    elif not stats.kv_connector_stats:
        stats.kv_connector_stats = None
    return load
