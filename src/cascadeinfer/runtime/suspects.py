"""
Handles the requests of an instance that does not answer.

A suspected instance gets no new requests (the policy's books exclude it, `core/view.py`). Requests waiting there that
have not started are withdrawn if another instance can take them, and are reported to the policy with the suspicion,
which places them like orphans. The same holds for requests that a migration left there to be recomputed. Running
requests stay: they continue when the instance does, or elsewhere if it is killed.

A request not reported as running may be part of the very step that makes the instance late. So that a long prompt does
not wander from instance to instance for ever, a request is withdrawn at most `MAX_WITHDRAWALS` times, and never if it
may be what the instance hangs on (`core/quarantine.py`).
"""

import logging
from collections.abc import Callable
from typing import Final

from cascadeinfer.core import migration
from cascadeinfer.core.events import Event, InstanceSuspected, InstanceTrusted
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.instance_state import Deed, Happening
from cascadeinfer.runtime.isolation import Isolation
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.perform import Performer
from cascadeinfer.runtime.streams import Stream, StreamTable
from cascadeinfer.runtime.view import InstanceRecord

logger = logging.getLogger(__name__)

COMPUTED_ANEW: Final = frozenset({migration.State.RECOMPUTING, migration.State.RETURNING})
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
        performer: Performer,
        isolation: Isolation,
    ) -> None:
        """
        Args:
            fleet: The instances.
            streams: The live requests.
            metrics: Counts suspicions and withdrawals.
            emit: Hands the policy an event.
            performer: Stops a request on its instance, or ends its migration.
            isolation: Remembers withdrawn requests, in case the instance is given up.
        """
        self._fleet = fleet
        self._streams = streams
        self._metrics = metrics
        self._emit = emit
        self._performer = performer
        self._isolation = isolation

    def suspected(self, engine: Engine) -> None:
        """Its report is overdue, newly or still; in the latter case other instances may have become free."""
        record = self._fleet[engine.instance_id]
        if record.engine is not engine:
            return  # it is being connected
        is_new = record.supervisor.happen(Happening.SUSPECTED)
        if is_new:
            self._metrics.suspicions.inc()
            logger.warning("instance %s does not answer; others get what is new", engine.instance_id)
        withdrawn = self._withdraw(record)
        if is_new or withdrawn:
            self._emit(InstanceSuspected(f"silent:{record.instance_id}", record.instance_id, withdrawn))

    def trusted(self, engine: Engine) -> None:
        """It answers in time again."""
        record = self._fleet[engine.instance_id]
        if record.engine is engine and record.supervisor.happen(Happening.TRUSTED):
            self._isolation.instance_trusted(engine.instance_id)
            self._emit(InstanceTrusted(f"answers:{engine.instance_id}", engine.instance_id))

    def _withdraw(self, record: InstanceRecord) -> tuple[RequestId, ...]:
        """Withdraw the requests that wait there and can go elsewhere."""
        if not self._others_answer(record.instance_id):
            return ()
        withdrawn = self._unstarted(record)
        for stream in withdrawn:
            stream.withdrawals += 1
            self._isolation.taken_away(stream, record.instance_id)
            if stream.migration is None:
                self._performer.abort(stream)
                self._streams.displace(stream)
            else:
                self._performer.migrator.happen(stream.migration.migration_id, migration.Happening.PLACE_SILENT)
        self._metrics.withdrawn.inc(len(withdrawn))
        return tuple(stream.request.request_id for stream in withdrawn if stream.instance_id is None)

    def _others_answer(self, instance_id: InstanceId) -> bool:
        return any(record.life.allows(Deed.TAKE) for record in self._fleet if record.instance_id != instance_id)

    def _unstarted(self, record: InstanceRecord) -> list[Stream]:
        """Requests there that have no token of this attempt and were not seen running."""
        running = set(record.report.running_ids)
        return [
            stream
            for stream in self._streams.on_instance(record.instance_id)
            if (stream.migration is None or stream.migration.state in COMPUTED_ANEW)
            and not stream.started
            and stream.engine_request_id not in running
            and stream.withdrawals < MAX_WITHDRAWALS
            and self._isolation.may_be_taken(stream)
        ]
