"""
Carries migrations out on two engines, following the state machine in `core/migration/`.

`Migrator` feeds each migration its events (engine answers, tokens, deaths, timers) and carries out the resulting
actions. Every command runs in its own task; its answer is one more event, ignored if the migration is over by then.
Exactly one `on_ended` follows each `start`.

A pull's deadline counts from when the cut was sent. After this process itself was suspended, the target's tokens and
the overdue timer may arrive together, in any order. `expire` therefore runs before each step's tokens are processed, so
that the deadline wins.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from cascadeinfer.core.effects import StartMigration
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome
from cascadeinfer.core.migration import Action, Happening, Migration, MigrationLimits, PullEstimate, State
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceId, MigrationId
from cascadeinfer.engines.protocol import Engine, KvTicket, Resume
from cascadeinfer.runtime.commands import Commands
from cascadeinfer.runtime.streams import Stream, StreamTable

LEFT_A_READ: Final = {
    (State.COPYING, Happening.TIMED_OUT),
    (State.COPYING, Happening.REQUEST_ENDED),
    (State.COPYING, Happening.CLIENT_LEFT),
    (State.RESUMING, Happening.TIMED_OUT),
    (State.RESUMING, Happening.CLIENT_LEFT),
}
"""What ends a migration while the target reads from the source: the read may hang, and holds blocks until it fails."""


@dataclass(slots=True)
class MigrationRecord:
    """
    A migration and what is known of it.

    Attributes:
        source_request_id: The attempt's id at the source, for abort and unpin.
        ticket: The source's ticket, once cut.
        copy_s: How long the copy before the cut took.
        resumed_s: When the target was told to pull, on the loop's clock.
        pull_s: From then to the first token at the target.
    """

    migration: Migration
    stream: Stream
    source_request_id: str
    started_s: float
    ticket: KvTicket | None = None
    copy_s: float = 0.0
    pause_s: float | None = None
    resumed_s: float | None = None
    pull_s: float | None = None
    timer: asyncio.TimerHandle | None = None

    def ended(self, *, measures: bool) -> MigrationEnded:
        """The event that reports the end; `measures`: with what the pull tells of the link, if there was one."""
        ended = self.migration.ended()
        if not measures or ended.outcome is not MigrationOutcome.MOVED or self.ticket is None or self.pull_s is None:
            return ended
        pull_s = self.copy_s if ended.copied_tokens else self.pull_s
        return replace(ended, pulled_tokens=self.ticket.n_tokens, pull_s=pull_s)


class EngineDirectory(Protocol):
    """Where the migrator finds live engines."""

    def engine(self, instance_id: InstanceId) -> Engine | None:
        """The engine with this id when it is up, else None."""
        ...

    def connected(self, one_id: InstanceId, other_id: InstanceId) -> bool:
        """Whether both are up and KV cache can go from one to the other."""
        ...

    def doubt(self, target_id: InstanceId, source_id: InstanceId, why: str) -> None:
        """A read has not come to an end: find out whether the target reaches the source."""
        ...


class Migrator:
    """All migrations under way."""

    def __init__(
        self,
        engines: EngineDirectory,
        streams: StreamTable,
        on_ended: Callable[[MigrationRecord], None],
        limits: MigrationLimits,
        add_failed: Callable[[Stream, str], None],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            engines: Where to find the two engines.
            streams: The live requests; the migrator moves their attempts.
            on_ended: Called once per migration, when it is over.
            limits: Limits of every migration.
            add_failed: Called with a request, and the id of its attempt, that could not be sent to an engine.
            clock: The time in seconds, on the clock of the engines' `Resume.pull_before_s`. It must not stand still
                while a callback runs.
        """
        self._add_failed = add_failed
        self._engines = engines
        self._streams = streams
        self._on_ended = on_ended
        self._limits = limits
        self._clock = clock
        self._records: dict[MigrationId, MigrationRecord] = {}
        self._commands = Commands("a migration command")

    def __len__(self) -> int:
        """Migrations under way."""
        return len(self._records)

    def under_way(self) -> list[MigrationRecord]:
        """Migrations under way, the oldest first."""
        return list(self._records.values())

    def involves(self, instance_id: InstanceId) -> bool:
        """Whether an instance takes part in a migration under way."""
        return any(
            instance_id in {record.migration.source_id, record.migration.target_id} for record in self._records.values()
        )

    def start(
        self, effect: StartMigration, stream: Stream, parked: KvTicket | None = None, pull_s: float | None = None
    ) -> None:
        """
        Begin.

        Args:
            effect: The policy's order.
            stream: It must be on the effect's source and not be in a migration.
            parked: Where its KV cache is pinned, if it is parked there.
            pull_s: How long pulling its whole KV cache takes, as far as that is known.
        """
        assert stream.migration is None
        assert stream.instance_id == effect.source_id
        assert stream.engine_request_id is not None
        if parked is None:
            estimate = PullEstimate(pull_s, stream.token_s)
            migration = Migration(effect, stream.n_tokens, self._limits, estimate=estimate)
        else:
            migration = Migration.of_parked(effect, stream.n_tokens, self._limits, self._clock())
        now_s = asyncio.get_running_loop().time()
        record = MigrationRecord(migration, stream, stream.engine_request_id, now_s, parked)
        stream.migration = migration
        self._records[effect.migration_id] = record
        self._arm(record)
        self._act(record, Action.ASK_ROOM)

    def happen(self, migration_id: MigrationId, happening: Happening, refusal: Refusal | None = None) -> None:
        """Apply an event to a migration; ignored when it is over."""
        record = self._records.get(migration_id)
        if record is None:
            return
        migration = record.migration
        before = migration.state
        if (before, happening) in LEFT_A_READ:
            self._engines.doubt(migration.target_id, migration.source_id, "a read did not come to an end")
        for action in migration.handle(happening, self._clock(), refusal):
            self._act(record, action)
        if migration.outcome is not None:
            self._end(record)
        elif migration.state is not before:
            self._arm(record)

    def cut_took_effect(self, migration_id: MigrationId, ticket: KvTicket) -> None:
        """The source's final output arrived: the request runs nowhere until it is resumed."""
        record = self._records.get(migration_id)
        if record is None:
            return
        record.ticket = ticket
        self._streams.displace(record.stream)
        self.happen(migration_id, record.migration.cut_heard(self._clock(), ticket.n_tokens))

    def token_came(self, stream: Stream, now_s: float) -> None:
        """A request in migration produced a token."""
        migration = stream.migration
        assert migration is not None
        record = self._records[migration.migration_id]
        if migration.at_target and record.pause_s is None and stream.last_token_s is not None:
            record.pause_s = now_s - stream.last_token_s
            record.pull_s = None if record.resumed_s is None else asyncio.get_running_loop().time() - record.resumed_s
        self.happen(migration.migration_id, Happening.FIRST_TOKEN)

    def expire(self) -> None:
        """
        End the pulls whose deadline has passed, even if their timer is late.

        Call this before processing a step's tokens: a token computed after the deadline may stem from blocks that were
        no longer pinned, and then belongs to an attempt that has been given up.
        """
        if not self._records:
            return
        now_s = self._clock()
        for record in list(self._records.values()):
            if record.migration.is_overdue(now_s):
                self.happen(record.migration.migration_id, Happening.TIMED_OUT)

    def instance_lost(self, instance_id: InstanceId) -> None:
        """An instance is gone: notify every migration it takes part in."""
        for record in list(self._records.values()):
            if record.migration.source_id == instance_id:
                self.happen(record.migration.migration_id, Happening.SOURCE_LOST)
            elif record.migration.target_id == instance_id:
                self.happen(record.migration.migration_id, Happening.TARGET_LOST)

    async def stop(self) -> None:
        """Cancel what is under way; for shutdown, after the last request."""
        for record in self._records.values():
            if record.timer is not None:
                record.timer.cancel()
            record.stream.migration = None  # its tokens may still come
        self._records.clear()
        await self._commands.stop()

    def _end(self, record: MigrationRecord) -> None:
        if record.timer is not None:
            record.timer.cancel()
        del self._records[record.migration.migration_id]
        record.stream.migration = None
        self._on_ended(record)

    def _arm(self, record: MigrationRecord) -> None:
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None
        migration = record.migration
        limit_s = migration.limit_s(self._clock())
        if limit_s is not None:
            record.timer = asyncio.get_running_loop().call_later(
                limit_s, self.happen, migration.migration_id, Happening.TIMED_OUT
            )

    def _act(self, record: MigrationRecord, action: Action) -> None:
        match action:
            case Action.RESUME:
                record.resumed_s = asyncio.get_running_loop().time()
                self._add(record, record.migration.target_id, record.ticket, "moved")
            case Action.RECOMPUTE:
                self._add(record, record.migration.target_id, None, "recomputed")
            case Action.TAKE_BACK:
                self._add(record, record.migration.source_id, None, "taken back")
            case Action.ABORT_AT_TARGET | Action.ABORT_AT_SOURCE:
                self._abort(record, action)
            case _:
                self._commands.send(self._command(record, action))

    def _add(self, record: MigrationRecord, instance_id: InstanceId, ticket: KvTicket | None, how: str) -> None:
        engine = self._engines.engine(instance_id)
        engine_request_id = self._streams.place(record.stream, instance_id, how, record.migration.effect.reason.value)
        if engine is None:
            return  # its loss arrives as a separate event
        resume = Resume(
            list(record.stream.output_token_ids),
            ticket,
            record.migration.migration_id if ticket is not None else None,
            record.migration.deadline_s if ticket is not None else None,
        )
        failed = partial(self._add_failed, record.stream, engine_request_id)
        self._commands.send(engine.add(engine_request_id, record.stream.request, resume), failed)

    def _abort(self, record: MigrationRecord, action: Action) -> None:
        stream = record.stream
        at_source = action is Action.ABORT_AT_SOURCE
        engine_request_id = record.source_request_id if at_source else stream.engine_request_id
        if at_source and stream.instance_id == record.migration.source_id:
            engine_request_id = stream.engine_request_id  # after TAKE_BACK it has another id
        instance_id = record.migration.source_id if at_source else record.migration.target_id
        engine = self._engines.engine(instance_id)
        self._streams.displace(stream)
        if engine is not None and engine_request_id is not None:
            self._commands.send(engine.abort([engine_request_id]))

    async def _command(self, record: MigrationRecord, action: Action) -> None:
        """Send one command to one engine. A dying engine answers nothing; its loss arrives as a separate event."""
        migration = record.migration
        if action is Action.COPY:
            await self._copy(record)
            return
        to_target = action in {Action.ASK_ROOM, Action.RELEASE_ROOM}
        engine = self._engines.engine(migration.target_id if to_target else migration.source_id)
        if engine is None:
            if action is Action.ASK_ROOM:
                self.happen(migration.migration_id, Happening.ROOM_REFUSED, Refusal.TARGET_DOWN)
            return
        if action is Action.ASK_ROOM and not self._engines.connected(migration.source_id, migration.target_id):
            self.happen(migration.migration_id, Happening.ROOM_REFUSED, Refusal.NOT_CONNECTED)
            return
        with contextlib.suppress(EngineError):
            if action is Action.ASK_ROOM and not await self._is_pinned(record):
                self.happen(migration.migration_id, Happening.PIN_LOST)
                return
            await self._ask(engine, record, action)

    async def _is_pinned(self, record: MigrationRecord) -> bool:
        """Whether its migration can begin: if it is parked, its lease has begun anew. Raises EngineError."""
        if record.migration.state is not State.PARKED:
            return True
        source = self._engines.engine(record.migration.source_id)
        return source is None or await source.renew_pin(record.source_request_id)  # its loss is an event of its own

    async def _ask(self, engine: Engine, record: MigrationRecord, action: Action) -> None:
        migration = record.migration
        migration_id = migration.migration_id
        match action:
            case Action.ASK_ROOM if migration_id not in self._records:
                pass  # it ended while the lease was renewed
            case Action.ASK_ROOM:
                for_parked = migration.state is State.PARKED
                refused = await engine.reserve(migration_id, migration.room_tokens, for_parked=for_parked)
                granted = refused is None
                if granted and migration_id not in self._records:
                    await engine.release_reservation(migration_id)  # it ended while we asked
                self.happen(migration_id, migration.room_heard() if granted else Happening.ROOM_REFUSED, refused)
            case Action.CUT:
                outgrew = migration.has_outgrown_room(record.stream.n_tokens)
                refused = Refusal.OUTGREW_ROOM if outgrew else await engine.cut(record.source_request_id)
                if refused is not None:
                    self.happen(migration_id, Happening.CUT_REFUSED, refused)
            case Action.UNDO_CUT:
                if await engine.undo_cut(record.source_request_id):
                    self.happen(migration_id, Happening.CUT_UNDONE)
            case _:
                await self._release(engine, record, action)

    @staticmethod
    async def _release(engine: Engine, record: MigrationRecord, action: Action) -> None:
        match action:
            case Action.RELEASE_ROOM:
                await engine.release_reservation(record.migration.migration_id)
            case Action.RELEASE_PIN:
                await engine.release_pin(record.source_request_id)
            case Action.RELEASE_COPY:
                await engine.release_full_blocks(record.source_request_id)
            case _:
                raise AssertionError(action)

    async def _copy(self, record: MigrationRecord) -> None:
        """Copy the full blocks. The end of the migration does not wait for it: both ends take back what they hold."""
        migration = record.migration
        source, target = (self._engines.engine(i) for i in (migration.source_id, migration.target_id))
        if source is None or target is None:
            return  # its loss arrives as a separate event
        began_s = asyncio.get_running_loop().time()
        with contextlib.suppress(EngineError):
            ticket = await source.pin_full_blocks(record.source_request_id)
            if migration.state is not State.COPYING:
                await source.release_full_blocks(record.source_request_id)  # it ended while we asked
                return
            copied = ticket is not None and await target.precopy(
                migration.migration_id, ticket, migration.copy_deadline_s
            )
            if copied and ticket is not None and migration.state is State.COPYING:
                migration.copied_tokens = ticket.n_tokens
                record.copy_s = asyncio.get_running_loop().time() - began_s
            self.happen(migration.migration_id, Happening.COPIED if copied else Happening.NOT_COPIED)
