"""
Shell no. 2: runs a policy on real engines.

Everything happens on one event loop. Facts (a request arrives, a step's outputs arrive, an instance dies, a migration
ends) become events; `PolicyDriver` hands them to the policy one at a time and carries its effects out at once. The
front end reads the merged outputs from `next_outputs`, in which a migrated request looks as if it had never moved: the
finishes of cut requests are hidden, and ids are the request's own.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.core.events import (
    Event,
    InstanceJoined,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    RequestArrived,
    RequestFinished,
)
from cascadeinfer.core.kind import InstanceTerms
from cascadeinfer.core.migration import Happening, MigrationLimits
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.quarantine import DEATHS
from cascadeinfer.core.types import InstanceCapacity, InstanceId, RequestId
from cascadeinfer.engines.build import Origin
from cascadeinfer.engines.protocol import Engine, EngineCounters, EngineRequest, StepOutputs
from cascadeinfer.engines.source import EngineSource
from cascadeinfer.runtime.driver import Observer, PolicyDriver
from cascadeinfer.runtime.elastic import Elasticity
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.gauges import FleetGauges
from cascadeinfer.runtime.given_up import GivenUp
from cascadeinfer.runtime.isolation import POISON_SENTENCE, Isolation
from cascadeinfer.runtime.ledger import Ledger
from cascadeinfer.runtime.lookout import Lookout
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.perform import Performer
from cascadeinfer.runtime.recovery import Recovery
from cascadeinfer.runtime.stories import Stories
from cascadeinfer.runtime.streams import Journey, Seen, Stream, StreamTable
from cascadeinfer.runtime.supervise import SupervisionTimes
from cascadeinfer.runtime.suspects import Suspects
from cascadeinfer.runtime.versions import Versions
from cascadeinfer.runtime.view import snapshot, tally


class Runtime:
    """N engines, one policy, all live requests."""

    def __init__(
        self,
        make_engines: Mapping[InstanceId, Callable[[int], Engine]],
        policy: Policy,
        make_metrics: Callable[[Callable[[], FleetGauges]], RuntimeMetrics],
        *,
        supervision: SupervisionTimes | None = None,
        migration: MigrationLimits | None = None,
        source: EngineSource | None = None,
        observer: Observer | None = None,
        poison_deaths: int = DEATHS,
        terms: Mapping[InstanceId, InstanceTerms] | None = None,
        origins: Mapping[InstanceId, Origin] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            make_engines: Per instance, what makes its engine for the n-th start.
            policy: The strategy; this object is its only driver.
            make_metrics: Makes the metrics from what reads the gauges.
            supervision: Limits and intervals for instances.
            migration: Limits of migrations.
            source: Makes engines of instances that are added later; None: none can be.
            observer: Sees every event with its effects: the event log.
            poison_deaths: Of instances under a request, after which it is ended.
            terms: Roles and chunk budgets; None: no engine's budget is changed.
            origins: Where the instances come from, as another process says; None: as the source says.
            clock: The time in seconds (not the loop's own: uvloop's counts whole milliseconds).
        """
        self._clock = clock
        self._streams = StreamTable()
        self.seen = Seen()
        of_source = {} if source is None else {name: Origin(build) for name, build in source.first_builds.items()}
        self.fleet = Fleet(make_engines, self, supervision or SupervisionTimes(), clock, terms, origins or of_source)
        self._streams.on_placed = self.fleet.wake
        self.metrics = make_metrics(self.fleet.gauges)
        self.ledger = Ledger(clock)
        self._isolation = Isolation(self._streams, self.metrics, clock, poison_deaths)
        self._performer = Performer(
            self.fleet, self._streams, self.metrics, self.ledger, self.emit, self._refuse_late, self._fail,
            self._isolation, Versions(self.fleet, self._streams, self._end), migration or MigrationLimits(), clock,
        )  # fmt: skip
        self._migrator = self._performer.migrator
        self.elastic = Elasticity(self.fleet, self._streams, self._migrator, self, self.emit, clock, source)
        self._recovery = Recovery(self.fleet, self._streams, self.metrics, self)
        self._suspects = Suspects(self.fleet, self._streams, self.metrics, self.emit, self._performer, self._isolation)
        stories = Stories(self._streams, self.fleet, observer)
        self._driver = PolicyDriver(
            policy, self._performer.carry_out, clock, failed=self._recovery.policy_failed, observer=stories,
            settled=self._show,
        )  # fmt: skip
        self.lookout = Lookout(self.fleet, self._streams, self._migrator, self.ledger, policy, clock)
        self._outputs: asyncio.Queue[StepOutputs] = asyncio.Queue()
        self._given_up = GivenUp(self._give_up)
        #: Called for a request refused after `submit` has returned and before its first token; None: it ends with an
        #: error.
        self.on_late_refusal: Callable[[RequestId, RequestRejectedError], None] | None = None
        #: Called for a request that cannot continue, with a sentence for its client; None: it ends with a bare error.
        self.on_failure: Callable[[RequestId, str], None] | None = None

    # --- for the front end -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """
        Start all instances in parallel; returns when every one answers and is connected to every other.

        Raises:
            EngineError: One did not start; all others have been stopped.
        """
        self.lookout.begin()
        try:
            await self.fleet.start()
        except BaseException:  # a signal during the start included
            await self.stop(timeout_s=0.0)
            raise

    async def submit(self, request: EngineRequest) -> None:
        """
        Take a request; its tokens come from `next_outputs`.

        Raises:
            RequestRejectedError: The policy refused it.
            PolicyError: The policy failed at it.
            RequestIdInUseError: Another one with its id is live, and goes on.
        """
        stream = self._streams.open(request, self._clock())
        self.seen.n_arrived += 1
        if request.pin_reason is not None:
            self.metrics.pinned_requests.labels(request.pin_reason.value).inc()
        arrived = RequestArrived(
            request.request_id, request.request_id, len(request.prompt_token_ids), request.max_output_tokens,
            request.prefix_hashes, request.pin_reason, priority=request.priority,
        )  # fmt: skip
        stream.arriving = True
        try:
            self.emit(arrived)
        finally:
            stream.arriving = False
        if stream.refusal is not None:
            self._finish(stream, stream.refusal.outcome)
            raise stream.refusal.error

    def journey_of(self, request_id: RequestId) -> Journey | None:
        """Where a live request has been, and will have been; None if it is not live."""
        stream = self._streams.get(request_id)
        return None if stream is None else stream.journey

    def abort(self, request_ids: list[RequestId]) -> None:
        """Abort these requests, wherever they run; ids that are not live are ignored."""
        for request_id in request_ids:
            if (stream := self._streams.get(request_id)) is not None:
                self._finish(stream, "aborted")

    async def next_outputs(self) -> StepOutputs:
        """Outputs of one step of one instance, with the requests' own ids."""
        return await self._outputs.get()

    def snapshot(self) -> dict[str, Any]:
        """The JSON of `/admin/instances`."""
        now_s = self._clock()
        shown = snapshot(
            self.fleet, self.fleet.departed, self.fleet.layout, self._streams, len(self._migrator),
            self._performer.migration_counts, now_s, self.fleet.pairs.broken(), self.fleet.links.known(),
        )  # fmt: skip
        return {**shown, **self._isolation.shown(now_s)}

    def tally(self) -> dict[str, Any]:
        """The numbers of the snapshot that add up over several processes."""
        return tally(self._streams, len(self._migrator), self._performer.migration_counts)

    def unfinished(self) -> list[tuple[float, int, int, int]]:
        """Of each live request, the fields of a SeenLive."""
        return [
            (s.arrived_s, len(s.request.prompt_token_ids), len(s.output_token_ids), s.request.max_output_tokens)
            for s in self._streams
        ]

    def live_engines(self) -> list[Engine]:
        """Engines that are up, in the order in which they were made known."""
        return self.fleet.live_engines()

    @property
    def n_live_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def stop(self, timeout_s: float) -> None:
        """Stop everything. Live requests get no more tokens."""
        self._driver.stop()
        self._recovery.stop()
        self._given_up.stop()
        await self.elastic.stop()
        await self._performer.stop()
        await self.fleet.stop(timeout_s)
        self.metrics.close()

    # --- Listener: what instances tell -------------------------------------------------------------------------------

    async def instance_up(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """Connect it to all that are up, then let the policy use it."""
        kind = await self.fleet.join(engine, capacity)
        if self._streams.on_instance(engine.instance_id):
            self.announce_loss(engine.instance_id)  # the policy, which failed at its loss, sent requests to the dead
        replaces = self.fleet[engine.instance_id].replaces
        self.emit(InstanceJoined(f"up:{engine.instance_id}", engine.instance_id, kind, replaces, engine.node))

    def instance_outputs(self, engine: Engine, outputs: StepOutputs) -> None:
        """Deliver a step's tokens; drop late output of superseded attempts; hide the finishes of cuts."""
        self._migrator.expire()
        now_s = self._clock()
        delivered = []
        stream_of = self._streams.of_attempt
        for delta in outputs.outputs:
            stream = stream_of(delta.request_id)
            if stream is None:
                continue
            if delta.finish_reason is not None and engine.has_dropped(delta):
                self._given_up.wait(stream, outputs, delta)
                continue
            if self._deliver(engine, stream, delta, now_s):
                delivered.append(delta)
        outputs.outputs = delivered
        self._outputs.put_nowait(outputs)

    def _give_up(self, stream: Stream, outputs: StepOutputs) -> None:
        """The instance gave the request up but survives: tell its client."""
        self._outputs.put_nowait(outputs)
        self._computed(stream)
        self._finish(stream, "dropped")

    def instance_reported(
        self, engine: Engine, report: InstanceReport, counters: EngineCounters, asked_s: float | None
    ) -> None:
        """Translate attempt ids to request ids and tell the policy."""
        record = self.fleet[engine.instance_id]
        if record.engine is not engine:
            return  # it is being connected
        record.report, record.counters = report, counters
        if counters.paused:
            self._given_up.paused(engine.instance_id)
        self._isolation.instance_answered(engine.instance_id, asked_s)
        self.elastic.look(record)
        cause = f"report:{engine.instance_id}:{counters.steps}"
        self.emit(InstanceReported(cause, engine.instance_id, self._streams.known(report)))

    def instance_suspected(self, engine: Engine) -> None:
        """Requests waiting there are moved elsewhere."""
        self._suspects.suspected(engine)

    def instance_trusted(self, engine: Engine) -> None:
        """Tell the policy."""
        self._suspects.trusted(engine)

    def instance_down(self, instance_id: InstanceId, why: str, *, planned: bool = False) -> None:
        """Its requests are orphans: the policy places them anew, and they continue from prompt and output so far."""
        self.elastic.look(self.fleet.went_down(instance_id, why))
        self._migrator.instance_lost(instance_id)
        if planned:
            self._isolation.instance_trusted(instance_id)
        elif (culprit := self._isolation.instance_died(instance_id)) is not None:
            self._end(culprit, "poison", POISON_SENTENCE, is_computed=culprit.instance_id == instance_id)
        self.announce_loss(instance_id)

    # --- the steps behind them ---------------------------------------------------------------------------------------

    def announce_loss(self, instance_id: InstanceId) -> None:
        """Tell the policy that an instance is gone, with what was there."""
        orphans = self._streams.on_instance(instance_id)
        for stream in orphans:
            self._streams.displace(stream)
            exact = "yes" if stream.request.pin_reason is None else "no"
            self.metrics.recovered.labels(exact).inc()
        self.emit(
            InstanceLost(
                f"down:{instance_id}",
                instance_id,
                tuple(stream.request.request_id for stream in orphans),
                tuple(stream.n_tokens for stream in orphans),
            )
        )

    def _show(self) -> None:
        self.metrics.show(self._streams.n_unplaced, len(self._migrator), self._performer.parkings.n_parked)

    def emit(self, event: Event) -> None:
        """Hand the policy an event."""
        self._driver.emit(event)

    def end_with_error(self, stream: Stream, outcome: str) -> None:
        """Its client gets an error; `outcome` is a metric label."""
        engine = next(s.supervisor.engine for s in self.fleet if s.supervisor.engine is not None)
        self._outputs.put_nowait(engine.failure_of(stream.request.request_id))
        self._finish(stream, outcome)

    def _end(self, stream: Stream, outcome: str, sentence: str, *, is_computed: bool = True) -> None:
        """
        A request cannot go on.

        Args:
            outcome: A metric label.
            sentence: For its client.
            is_computed: Whether no engine has it.
        """
        if is_computed:
            self._computed(stream)
        if self.on_failure is None:
            self.end_with_error(stream, outcome)
            return
        self._finish(stream, outcome)
        self.on_failure(stream.request.request_id, sentence)

    def _fail(self, stream: Stream) -> None:
        """A request could not be sent to its engine."""
        self._end(stream, "failed", "the request could not be sent to an instance; the server's log says why")

    def _refuse_late(self, stream: Stream, refusal: RequestRejectedError) -> None:
        """The policy refuses a request that it had accepted."""
        if self.on_late_refusal is None or stream.output_token_ids:
            self.end_with_error(stream, "rejected")
            return
        self._finish(stream, "rejected")
        self.on_late_refusal(stream.request.request_id, refusal)

    def _computed(self, stream: Stream) -> None:
        """No engine has it any more: nothing must be stopped when it ends."""
        stream.ending = True
        if stream.migration is not None:
            self._migrator.happen(stream.migration.migration_id, Happening.REQUEST_ENDED)

    def _stop_computing(self, stream: Stream) -> None:
        """Nobody waits for the rest of its output: stop it wherever it runs."""
        stream.ending = True
        if stream.migration is not None:
            self._migrator.happen(stream.migration.migration_id, Happening.CLIENT_LEFT)
        else:
            self._performer.abort(stream)

    def _deliver(self, engine: Engine, stream: Stream, delta: Any, now_s: float) -> bool:
        """
        Returns whether the output goes to the client: not if the policy, on hearing that a migration ended, refuses the
        request.
        """
        if stream.attempts > 1:
            delta.request_id = stream.request.request_id
            delta.events = None  # queued and scheduled again: of no meaning to the client's statistics
        stream.output_token_ids.extend(delta.new_token_ids)
        if delta.new_token_ids:
            if stream.migration is not None:
                self._migrator.token_came(stream, now_s)
                if stream.ending:
                    return False
            if stream.first_token_s is None:
                stream.first_token_s = now_s
                self.metrics.first_token(len(stream.request.prompt_token_ids), now_s - stream.arrived_s)
            stream.last_token_s = now_s
            self._isolation.token_came(stream)
        if delta.finish_reason is None:
            if stream.parks and delta.new_token_ids:
                self._performer.parkings.first_token(stream, None)
            return True
        ticket = engine.ticket_of(delta)
        if ticket is not None:
            delta.finish_reason = None
            delta.kv_transfer_params = None
            if stream.migration is not None:
                self._migrator.cut_took_effect(stream.migration.migration_id, ticket)
            else:
                self._performer.parkings.first_token(stream, ticket)
            return not stream.ending
        self._computed(stream)
        self._finish(stream, "failed" if engine.has_failed(delta) else "finished")
        return True

    def _finish(self, stream: Stream, outcome: str) -> None:
        if not stream.ending:
            self._stop_computing(stream)
        self._streams.close(stream)
        self.metrics.requests.labels(outcome).inc()
        self.ledger.request_ended(outcome)
        request_id = stream.request.request_id
        n_prompt, n_output = len(stream.request.prompt_token_ids), len(stream.output_token_ids)
        if outcome == "finished" and stream.first_token_s is not None and stream.last_token_s is not None:
            times_s = stream.first_token_s - stream.arrived_s, stream.last_token_s - stream.arrived_s
            self.metrics.finished(n_prompt, n_output, *times_s)
        self.seen.note_end(n_prompt, n_output, stream.arrived_s)
        self.emit(RequestFinished(request_id, request_id, n_output))
