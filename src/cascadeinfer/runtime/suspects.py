"""
What becomes of the requests of an instance that does not answer.

While it is suspected nothing new goes there (the policy's books see to that, `core/view.py`). What waits there without having been
started is taken away, if another instance can take it, and told to the policy with the suspicion: it places it like an orphan. What runs
there stays: it goes on when the instance does, or elsewhere when it is killed.

A request that the instance has not reported as running may be in the very step that makes it late. So that a long prompt does not wander for ever
from instance to instance, a request is taken away at most `MAX_WITHDRAWALS` times.
"""

from collections.abc import Callable
from typing import Final

from cascadeinfer.core.events import Event, InstanceSuspected, InstanceTrusted
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.streams import Stream, StreamTable
from cascadeinfer.runtime.view import InstanceState

MAX_WITHDRAWALS: Final = 2
"""Two, because two instances may fall silent one after the other."""


class Suspects:
    """See the module header."""

    def __init__(
        self,
        fleet: Fleet,
        streams: StreamTable,
        metrics: RuntimeMetrics,
        emit: Callable[[Event], None],
        abort: Callable[[Stream], None],
    ) -> None:
        """
        Args:
            fleet: The instances.
            streams: The live requests.
            metrics: Where suspicions and withdrawals are counted.
            emit: Hands the policy an event.
            abort: Stops a request on its instance.
        """
        self._fleet = fleet
        self._streams = streams
        self._metrics = metrics
        self._emit = emit
        self._abort = abort

    def suspected(self, engine: Engine) -> None:
        """Its report is overdue."""
        state = self._fleet[engine.instance_id]
        if state.engine is not engine:
            return  # it is being connected
        state.suspect = True
        self._metrics.suspicions.labels(engine.instance_id).inc()
        self._tell(state)

    def trusted(self, engine: Engine) -> None:
        """It answers in time again."""
        state = self._fleet[engine.instance_id]
        if state.engine is engine and state.suspect:
            state.suspect = False
            self._emit(InstanceTrusted(f"answers:{engine.instance_id}", engine.instance_id))

    def look_again(self) -> None:
        """An instance has come up: it can take what waits where nobody answers."""
        for state in self._fleet:
            if state.suspect and self._unstarted(state):
                self._tell(state)

    def _tell(self, state: InstanceState) -> None:
        withdrawn = self._unstarted(state) if self._others_answer(state.instance_id) else []
        for stream in withdrawn:
            self._abort(stream)
            self._streams.displace(stream)
            stream.withdrawals += 1
        self._metrics.withdrawn.inc(len(withdrawn))
        ids = tuple(stream.request.request_id for stream in withdrawn)
        self._emit(InstanceSuspected(f"silent:{state.instance_id}", state.instance_id, ids))

    def _others_answer(self, instance_id: InstanceId) -> bool:
        return any(
            state.engine is not None and state.drain is None and not state.suspect
            for state in self._fleet
            if state.instance_id != instance_id
        )

    def _unstarted(self, state: InstanceState) -> list[Stream]:
        """Requests there that have no token of this attempt and were not seen running."""
        running = set(state.report.running_ids)
        return [
            stream
            for stream in self._streams.on_instance(state.instance_id)
            if stream.migration is None
            and not stream.started
            and stream.engine_request_id not in running
            and stream.withdrawals < MAX_WITHDRAWALS
        ]
