"""
Shell no. 1: runs a policy on simulated instances in virtual time.

Facts (a request arrives, a step ends, an instance dies, a migration ends) become events; `policy_loop.py` hands each to
the policy and carries its effects out at once. Events that arise meanwhile are queued, so the policy sees one event at
a time. For the order at one moment see `kernel.Priority`. The order of events around a death or an end is the
runtime's: `MigrationEnded` comes before the `InstanceLost` or `RequestFinished` that caused it.
"""

import math
from typing import assert_never

import numpy as np

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
from cascadeinfer.core.errors import PolicyError
from cascadeinfer.core.events import (
    FirstToken,
    InstanceChanged,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    MessageReceived,
    RequestArrived,
    RequestFinished,
)
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.migration import Happening, NotBegun, not_begun
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.sim.fleet import Fleet
from cascadeinfer.sim.instance import SimInstance
from cascadeinfer.sim.kernel import Kernel, Priority
from cascadeinfer.sim.migrations import Migrator, Move
from cascadeinfer.sim.parkings import Parkings
from cascadeinfer.sim.policy_loop import Observer, PolicyLoop
from cascadeinfer.sim.recording import Recorder
from cascadeinfer.sim.requests import OVER, Phase, SimRequest
from cascadeinfer.sim.settings import SimConfig
from cascadeinfer.sim.steps import StepEnd
from cascadeinfer.workload.trace import Trace


class SimCluster:
    """
    N simulated instances, one policy, one trace.

    Attributes:
        requests: Those that have arrived, by row of the trace.
        live: Those that are not over, by id.
        fleet: The instances.
    """

    def __init__(self, trace: Trace, policy: Policy, config: SimConfig, observer: Observer | None = None) -> None:
        """
        Args:
            trace: Checked against the configuration by the caller (`sim/run.py`).
            policy: The strategy; this object is its only driver.
            config: The cluster.
            observer: Called after each event.
        """
        self.kernel = Kernel()
        self.config = config
        self.recorder = Recorder()
        self.requests: list[SimRequest] = []
        self.live: dict[RequestId, SimRequest] = {}
        unit_tokens = trace.prefix_block_tokens if config.prefix_caching else 0
        self.fleet = Fleet(self.kernel, config, self, unit_tokens=unit_tokens)
        self.migrator = Migrator(self, self.kernel, config)
        self.parkings = Parkings(self.kernel, config.parking, self._tell_first_token, self._take_back)
        self.messages_sent = 0
        self.messages_lost = 0
        self._trace = trace
        self._columns = (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
        self._rng = np.random.default_rng(config.seed)
        self._progress_s = 0.0
        self._to_come = len(trace)
        self._stop_s = math.inf if config.stop_s is None else config.stop_s
        self._stages: dict[InstanceId, int] = {}
        self._emit = PolicyLoop(policy, self.kernel, self._carry_out, observer).emit
        for leave in config.faults.disconnects:
            self.kernel.at(leave.at_s, Priority.FAULT, self._disconnect, leave.row)
        if len(trace):
            self.kernel.at(self._columns[0][0], Priority.ARRIVAL, self._arrive, 0)

    # --- the run -----------------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether every request of the trace has come and gone."""
        return not (self._to_come or self.live)

    def step(self) -> bool:
        """
        Go to the next thing that happens.

        Returns:
            False when the run is over, by itself or by `stop_s`.
        """
        return bool(self._to_come or self.live) and self.kernel.step(self._stop_s)

    def settle(self) -> None:
        """Bring everything up to the current time, for the records of a run that was stopped."""
        for request in self.live.values():
            if request.phase is Phase.DECODE and request.instance_id is not None:
                instance = self.instance(request.instance_id)
                assert instance is not None
                request.produced = instance.scheduler.length_of(request) - request.prompt_tokens

    def _arrive(self, row: int) -> None:
        arrivals, prompts, outputs = self._columns
        hashes = self._trace.prefix_hashes
        request = SimRequest(
            f"r{row}",
            row,
            arrivals[row],
            prompts[row],
            outputs[row],
            hashes[row] if hashes is not None and self.config.prefix_caching else (),
        )
        self.requests.append(request)
        self._to_come -= 1
        self.live[request.request_id] = request
        if row + 1 < len(arrivals):
            self.kernel.at(arrivals[row + 1], Priority.ARRIVAL, self._arrive, row + 1)
        cap = self.config.longest_tokens(request.prompt_tokens) - request.prompt_tokens
        self._emit(
            RequestArrived(request.request_id, request.request_id, request.prompt_tokens, cap, request.prefix_hashes)
        )

    def _finish(self, request: SimRequest) -> None:
        move = self.migrator.move_of(request)
        if move is not None:
            happening = Happening.CLIENT_LEFT if request.phase is not Phase.FINISHED else Happening.REQUEST_ENDED
            self.migrator.happen(move, happening)
        if request.phase not in OVER:
            self._take_away(request)
            request.phase = Phase.ABORTED
        self.parkings.left(request)
        request.instance_id = None
        del self.live[request.request_id]
        self._emit(RequestFinished(request.request_id, request.request_id, request.produced))

    def _disconnect(self, row: int) -> None:
        if row < len(self.requests) and self.requests[row].request_id in self.live:
            self._finish(self.requests[row])

    def _take_away(self, request: SimRequest) -> None:
        instance = self.instance(request.instance_id) if request.instance_id is not None else None
        if instance is not None:
            instance.remove(request, self.kernel.now_s)
            self.touched(instance)
        self.displaced(request)

    # --- Listener: what instances do ---------------------------------------------------------------------------------

    def instance_joined(self, instance: SimInstance) -> None:
        """Let the policy use it."""
        instance_id = instance.instance_id
        kind, node = self.fleet.kind_of(instance_id), self.config.network.nodes.get(instance_id, "")
        self._emit(InstanceJoined(f"up:{instance_id}", instance_id, kind, node=node))

    def instance_stepped(self, instance: SimInstance, end: StepEnd) -> None:
        """First tokens after a move, ends and cuts."""
        self._progress_s = self.kernel.now_s
        for request in end.watched:
            self.migrator.first_token(request)
        for request in end.finished:
            self._finish(request)
        for request in end.cut:
            self.migrator.cut_took_effect(request)
        for request in end.parked:
            self.parkings.first_token(request)
        if instance.instance_id in self.fleet.draining:
            self._leave_if_empty(instance)

    def instance_reported(self, instance: SimInstance, report: InstanceReport) -> None:
        """Keep a sample and tell the policy."""
        instance_id = instance.instance_id
        self.recorder.sample(self.kernel.now_s, instance, self._stages.get(instance_id, -1), report)
        self._emit(InstanceReported(f"report:{instance_id}:{instance.steps_done}", instance_id, report))
        self._check_stall()

    def instance_crashed(self, instance: SimInstance) -> None:
        """Its transfers stop."""
        self.migrator.instance_crashed(instance.instance_id)

    def instance_lost(self, instance: SimInstance) -> None:
        """Its requests are orphans: the policy places them anew, and they continue from prompt and output so far."""
        self.migrator.instance_lost(instance.instance_id)
        orphans = sorted(instance.scheduler.requests(), key=lambda request: request.row)
        for request in orphans:
            self._take_away(request)
        self.fleet.remove(instance)
        self._emit(
            InstanceLost(
                f"down:{instance.instance_id}",
                instance.instance_id,
                tuple(request.request_id for request in orphans),
                tuple(request.settled_tokens for request in orphans),
            )
        )

    def instance_draining(self, instance: SimInstance) -> None:
        """Tell the policy; an empty one leaves at once."""
        self._emit(InstanceDraining(f"drain:{instance.instance_id}", instance.instance_id))
        self._leave_if_empty(instance)

    def _leave_if_empty(self, instance: SimInstance) -> None:
        scheduler = instance.scheduler
        busy = scheduler.slots_taken() or scheduler.waiting or scheduler.pinned
        if instance.alive and not busy and not self.migrator.involves(instance.instance_id):
            self.fleet.leave(instance)

    def _check_stall(self) -> None:
        if not self.live:
            self._progress_s = self.kernel.now_s
        idle_s = self.kernel.now_s - self._progress_s
        if idle_s > self.config.stall_limit_s and all(i.idle for i in self.fleet.instances.values()):
            stuck = next(iter(self.live.values()))
            raise PolicyError(
                f"nothing has happened for {idle_s:.0f} s and {len(self.live)} requests are unfinished, the oldest "
                f"being {stuck.request_id} ({stuck.phase.value} on {stuck.instance_id})"
            )

    # --- Host: what the migrator needs --------------------------------------------------------------------------------

    def instance(self, instance_id: InstanceId) -> SimInstance | None:
        """An instance, brought up to the current time; None when it is gone."""
        return self.fleet.instance(instance_id)

    def touched(self, instance: SimInstance) -> None:
        """Make sure that the instance is woken in time."""
        self.fleet.touched(instance)

    def displaced(self, request: SimRequest) -> None:
        """The request is nowhere."""
        self.parkings.left(request)
        request.phase = Phase.UNPLACED
        request.instance_id = None

    def migration_ended(self, move: Move) -> None:
        """Record it and tell the policy."""
        self.parkings.move_ended(move.request)
        ended = move.ended(measures=bool(self.config.network.nodes))
        self.recorder.migration(move, ended, self.fleet.numbers)
        self._emit(ended)
        for instance_id in (move.migration.source_id, move.migration.target_id):
            if instance_id in self.fleet.draining and (instance := self.instance(instance_id)) is not None:
                self.kernel.at(self.kernel.now_s, Priority.CONTROL, self._leave_if_empty, instance)

    # --- the policy --------------------------------------------------------------------------------------------------

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Dispatch():
                self._dispatch(effect)
            case Reject():
                self._reject(effect)
            case StartMigration():
                self._start_migration(effect)
            case SendMessage():
                self._send(effect)
            case PublishLayout():
                self._show(effect.layout)
            case AssignTerms():
                if (kind := self.fleet.assign(effect.instance_id, effect.terms)) is not None:
                    self._emit(InstanceChanged(effect.cause, effect.instance_id, kind))
            case AdviseScale():
                pass  # nobody scales a simulated cluster
            case _:
                assert_never(effect)

    def _dispatch(self, effect: Dispatch) -> None:
        request = self.live.get(effect.request_id)
        if request is None:
            return  # its client left while it waited
        if request.instance_id is not None or self.migrator.move_of(request) is not None:
            raise PolicyError(f"{effect}: the request is on {request.instance_id} already")
        instance = self.instance(effect.instance_id)
        if instance is None:
            raise PolicyError(f"{effect}: there is no such instance; there are {sorted(self.fleet.instances)}")
        longest_tokens = self.config.longest_tokens(request.prompt_tokens)
        if longest_tokens > instance.capacity.kv_tokens:
            raise PolicyError(
                f"{effect}: the request may grow to {longest_tokens} tokens, "
                f"the KV cache there holds {instance.capacity.kv_tokens}"
            )
        if np.isnan(request.dispatched_s):
            request.dispatched_s = self.kernel.now_s
        if effect.shared:
            self.recorder.shared_s.append(self.kernel.now_s)
        request.armed = effect.park
        if effect.park:
            self.parkings.begin(request)
        request.instance_id = effect.instance_id
        instance.push(request, self.kernel.now_s)
        self.touched(instance)

    def _tell_first_token(self, request: SimRequest) -> None:
        assert request.instance_id is not None  # it is parked there
        self._emit(FirstToken(request.request_id, request.request_id, request.instance_id))

    def _take_back(self, request: SimRequest) -> None:
        assert request.instance_id is not None  # it is parked there
        instance = self.instance(request.instance_id)
        if instance is not None and instance.alive:
            instance.remove(request, self.kernel.now_s)
            instance.push(request, self.kernel.now_s)
            self.touched(instance)

    def _reject(self, effect: Reject) -> None:
        request = self.live.get(effect.request_id)
        if request is None:
            return
        if request.instance_id is not None:
            raise PolicyError(f"{effect}: the request is on {request.instance_id} already")
        request.phase = Phase.REJECTED
        self._finish(request)

    def _start_migration(self, effect: StartMigration) -> None:
        request = self.live.get(effect.request_id)
        source = self.instance(effect.source_id)
        if (
            request is None
            or source is None
            or self.migrator.move_of(request) is not None
            or request.instance_id != effect.source_id
        ):
            self._emit(not_begun(effect, NotBegun.STALE, is_live=request is not None))
            return
        parked_s = self.parkings.move_began(request)
        if parked_s is not None:
            self.migrator.start_parked(effect, request, parked_s)
        else:
            self.migrator.start(effect, request, source.scheduler.length_of(request))

    def _send(self, effect: SendMessage) -> None:
        self.messages_sent += 1
        faults = self.config.faults
        if faults.message_drop > 0.0 and self._rng.random() < faults.message_drop:
            self.messages_lost += 1
            return
        delay_s = self.config.network.message_delay_s
        if faults.message_jitter_s > 0.0:
            delay_s += float(self._rng.exponential(faults.message_jitter_s))
        self.kernel.at(self.kernel.now_s + delay_s, Priority.MESSAGE, self._deliver, effect)

    def _deliver(self, effect: SendMessage) -> None:
        recipient = self.fleet.instances.get(effect.recipient_id)
        if recipient is None or not recipient.alive:
            self.messages_lost += 1
            return
        self._emit(MessageReceived(effect.cause, effect.sender_id, effect.recipient_id, effect.message))

    def _show(self, layout: StageLayout) -> None:
        self._stages = {
            instance_id: index for index, stage in enumerate(layout.stages) for instance_id in stage.instance_ids
        }
        self.recorder.layouts.append((self.kernel.now_s, layout))
