"""Carries the policy's effects out. Each effect ends in an event, as `core/effects.py` promises."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import assert_never

from cascadeinfer.core.effects import (
    AdviseScale,
    AssignTerms,
    Dispatch,
    Effect,
    PublishLayout,
    Reject,
    SendMessage,
    StartMigration,
)
from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.core.events import Event, InstanceChanged, MessageReceived, MigrationEnded, MigrationOutcome
from cascadeinfer.core.migration import MigrationLimits, NotBegun, not_begun
from cascadeinfer.core.parking import ParkingLimits
from cascadeinfer.engines.protocol import Resume
from cascadeinfer.runtime.commands import Commands
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.isolation import Isolation
from cascadeinfer.runtime.ledger import Ledger
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.migrate import MigrationRecord, Migrator
from cascadeinfer.runtime.parkings import Parkings
from cascadeinfer.runtime.streams import Refusal, Stream, StreamTable
from cascadeinfer.runtime.versions import Versions

logger = logging.getLogger(__name__)


class Performer:
    """
    The runtime's hands.

    Attributes:
        migrator: The migrations under way.
        parkings: The requests that are to be parked, or are.
        migration_counts: Migrations that have ended, by outcome.
    """

    def __init__(
        self,
        fleet: Fleet,
        streams: StreamTable,
        metrics: RuntimeMetrics,
        ledger: Ledger,
        emit: Callable[[Event], None],
        refuse_late: Callable[[Stream, RequestRejectedError], None],
        fail: Callable[[Stream], None],
        isolation: Isolation,
        versions: Versions,
        limits: MigrationLimits,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            fleet: Where the engines are.
            streams: The live requests.
            metrics: Where ended migrations are counted.
            ledger: Where they are listed.
            emit: Takes the events in which effects end.
            refuse_late: Ends a request that the policy refuses after it has taken it.
            fail: Ends a request that cannot be sent to an engine.
            isolation: Keeps suspected requests apart.
            versions: Keeps requests with the version of the model that has begun them.
            limits: Of migrations.
            clock: The time in seconds.
        """
        self._fleet = fleet
        self._streams = streams
        self._metrics = metrics
        self._ledger = ledger
        self._emit = emit
        self._refuse_late = refuse_late
        self._fail = fail
        self._isolation = isolation
        self._versions = versions
        isolation.send = self._send
        self._commands = Commands("a command to an instance")
        self.migrator = Migrator(fleet, streams, self._migration_ended, limits, self._add_failed, clock)
        parking = ParkingLimits.renewing_within(limits.resume_s)
        self.parkings = Parkings(fleet, streams, parking, emit, self._add_failed)
        self.migration_counts: dict[str, int] = {}

    def carry_out(self, effect: Effect) -> None:
        """Start one effect. Never blocks."""
        match effect:
            case Dispatch():
                self._dispatch(effect)
            case Reject():
                self._reject(effect)
            case StartMigration():
                self._start_migration(effect)
            case SendMessage():
                message = MessageReceived(effect.cause, effect.sender_id, effect.recipient_id, effect.message)
                asyncio.get_running_loop().call_soon(self._emit, message)
            case PublishLayout():
                self._publish(effect)
            case AssignTerms():
                self._commands.send(self._assign(effect))
            case AdviseScale():
                self._advise(effect)
            case _:
                assert_never(effect)

    def _advise(self, effect: AdviseScale) -> None:
        if effect.n_instances is None:
            logger.warning("no number of instances is advised: %s", effect.why)
        else:
            self._metrics.desire(effect.n_instances)
            logger.info("%d instances are advised: %s", effect.n_instances, effect.why)

    async def _assign(self, effect: AssignTerms) -> None:
        kind = await self._fleet.assign(effect.instance_id, effect.terms)
        if kind is not None:
            tokens = kind.capacity.max_batched_tokens
            logger.info("instance %s: role %s, at most %d tokens in a step", effect.instance_id, kind.role, tokens)
            self._emit(InstanceChanged(effect.cause, effect.instance_id, kind))

    def _publish(self, effect: PublishLayout) -> None:
        self._fleet.publish(effect.layout, effect.why, effect.failure, effect.prefill)
        if effect.failure:
            self._metrics.plan_failures.inc()
            logger.error("stages stay as they are (%s): %s", effect.layout, effect.failure)
            return
        shown = ", ".join([*(f"prefill@{stage}" for stage in effect.prefill), str(effect.layout)])
        logger.info("stages: %s (%s)", shown, effect.why or "instances came or went")

    def abort(self, stream: Stream) -> None:
        """A request's client left: stop it on its instance. If it is in migration, the migrator stops it."""
        if stream.instance_id is not None and stream.engine_request_id is not None:
            engine = self._fleet.engine(stream.instance_id)
            if engine is not None:
                self._commands.send(engine.abort([stream.engine_request_id]))

    async def stop(self) -> None:
        """Cancel everything under way; for shutdown, after the last request."""
        await self.migrator.stop()
        await self.parkings.stop()
        await self._commands.stop()

    def _dispatch(self, effect: Dispatch) -> None:
        stream = self._streams.get(effect.request_id)
        if stream is None:
            return  # its client left while it waited
        if not self._versions.may_run(stream, effect.instance_id):
            self._versions.strand(stream)
            return
        self._streams.place(stream, effect.instance_id, "dispatched again" if stream.attempts else "dispatched")
        if effect.shared:
            self._metrics.shared.inc()
        if effect.park:
            self.parkings.begin(stream)
        if self._isolation.may_enter(stream):
            self._send(stream)

    def _reject(self, effect: Reject) -> None:
        stream = self._streams.get(effect.request_id)
        if stream is None:
            return  # its client left while it waited
        error = RequestRejectedError(effect.reason, effect.retry_after_s)
        if stream.arriving:
            stream.refusal = Refusal("rejected", error)
        else:
            self._refuse_late(stream, error)

    def _send(self, stream: Stream) -> None:
        """Send a request to the instance where it is placed."""
        assert stream.instance_id is not None
        assert stream.engine_request_id is not None
        engine = self._fleet.engine(stream.instance_id)
        if engine is None:
            return  # its loss arrives as an event, which orphans the request
        engine_request_id = stream.engine_request_id
        resume = Resume(list(stream.output_token_ids)) if stream.output_token_ids else None
        self._commands.send(
            engine.add(engine_request_id, stream.request, resume, park=stream.parks),
            partial(self._add_failed, stream, engine_request_id),
        )

    def _add_failed(self, stream: Stream, engine_request_id: str) -> None:
        """A request could not be sent. No engine died, so no other event would ever report it."""
        if stream.engine_request_id == engine_request_id:
            self._fail(stream)

    def _start_migration(self, effect: StartMigration) -> None:
        stream = self._streams.get(effect.request_id)
        if stream is None or stream.migration is not None or stream.instance_id != effect.source_id or stream.parks:
            self._tell_end(effect, not_begun(effect, NotBegun.STALE, is_live=stream is not None), stream)
        elif self._isolation.keeps(stream):
            self._tell_end(effect, not_begun(effect, NotBegun.SUSPECTED, is_live=True), stream)
        else:
            self._fleet.wake(effect.target_id)  # it owes an answer, and will hold room
            pull_s = self._fleet.links.pull_s(effect.source_id, effect.target_id, stream.n_tokens)
            self.migrator.start(effect, stream, self.parkings.move_began(stream), pull_s)

    def _migration_ended(self, record: MigrationRecord) -> None:
        links = self._fleet.links
        ended = record.ended(measures=links.knows(record.migration.target_id))
        links.pulled(ended.source_id, ended.target_id, ended.pulled_tokens, ended.pull_s, ended.copied_tokens)
        self.parkings.move_ended(record.stream)
        if record.pause_s is not None and ended.outcome in {MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED}:
            self._metrics.pause.labels(ended.outcome.value).observe(record.pause_s)
        self._tell_end(record.migration.effect, ended, record.stream, record.pause_s)

    def _tell_end(
        self, effect: StartMigration, ended: MigrationEnded, stream: Stream | None, pause_s: float | None = None
    ) -> None:
        outcome = ended.outcome.value
        self._ledger.move_ended(effect, ended, 0 if stream is None else stream.n_tokens, pause_s)
        self._metrics.migrations.labels(outcome, effect.reason.value, ended.detail).inc()
        self.migration_counts[outcome] = self.migration_counts.get(outcome, 0) + 1
        self._emit(ended)
