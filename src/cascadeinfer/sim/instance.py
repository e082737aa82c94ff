"""
One simulated instance: a scheduler on a clock.

A step is in flight from its start until `end_s`; what it computes is decided at its start, and its tokens come at its
end. Requests, commands and reports arrive in between and take effect at the next step's start, as in vLLM.

While the batch only decodes and no decision is near, the instance *cruises*: no step is a heap event. `wake_s` says
when the instance must be woken (the first step end that needs a decision). Until then `catch_up` runs the steps that
have ended meanwhile, in compiled code; call it before reading or changing the instance. Any change (a new request, a
freed block) may end the cruise at the step in flight. With `fast_forward` off, every step end is a wake-up; times and
results are the same to the last bit.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.latency import step_time_s
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, InstanceId, MigrationId, RequestId
from cascadeinfer.sim.batch import cruise
from cascadeinfer.sim.requests import Phase, SimRequest
from cascadeinfer.sim.scheduler import Scheduler
from cascadeinfer.sim.steps import StepEnd, StepPlan

IDLE: Final = math.inf


class SimInstance:
    """
    One instance. The shell calls the methods at non-decreasing times and wakes it at `wake_s`.

    Attributes:
        alive: False once it has crashed; nothing happens here after that.
        end_s: When the step in flight ends; infinite when there is none.
        steps_done: Steps finished since the start.
        busy_s: Sum of their durations.
    """

    def __init__(
        self,
        instance_id: InstanceId,
        number: int,
        capacity: InstanceCapacity,
        coefficients: NDArray[np.float64],
        *,
        blocks_per_unit: int = 0,
        fast_forward: bool = True,
    ) -> None:
        """
        Args:
            instance_id: Its name.
            number: Its place among all instances; decides between wake-ups at one moment.
            capacity: Blocks, slots and token budget.
            coefficients: Of the step time (`StepModel.coefficients`).
            blocks_per_unit: Blocks that one prefix hash covers; 0 turns prefix caching off.
            fast_forward: Whether runs of decode steps are done in compiled code.
        """
        self.instance_id = instance_id
        self.number = number
        self.capacity = capacity
        self.scheduler = Scheduler(capacity, blocks_per_unit)
        self.alive = True
        self.end_s = IDLE
        self.steps_done = 0
        self.busy_s = 0.0
        self.wake_version = 0
        self.scheduled_wake_s = IDLE
        self._coefficients = coefficients
        self._fast_forward = fast_forward
        self._flight_s = 0.0
        self._plan = StepPlan()
        self._cruising = False
        self._wake_s: float | None = None
        self._reported_steps = 0
        self._reported_busy_s = 0.0
        self._ids: tuple[RequestId, ...] = ()
        self._ids_of_change = -1

    @property
    def idle(self) -> bool:
        """Whether no step is in flight."""
        return self.end_s == IDLE

    def wake_s(self) -> float:
        """When `step_ended` must be called unless something changes first; infinite when idle."""
        if self._wake_s is None:
            self._wake_s = self._run_until(IDLE)[1] if self._cruising else self.end_s
        return self._wake_s

    def _run_until(self, limit_s: float) -> tuple[int, float, float, float, int]:
        batch = self.scheduler.batch
        batch.refresh()
        after: tuple[int, float, float, float, int] = cruise(
            self._coefficients,
            batch.by_residue,
            len(batch.members),
            batch.base_sum,
            batch.base_max,
            batch.finish_min,
            batch.steps,
            self.end_s,
            self._flight_s,
            self.busy_s,
            self.scheduler.kv.free_blocks,
            limit_s,
        )
        return after

    def catch_up(self, until_s: float) -> None:
        """Run the cruise's steps that end by this time (inclusive)."""
        if not self._cruising or self.end_s > until_s:
            return
        scheduler = self.scheduler
        before = scheduler.batch.steps
        scheduler.batch.steps, self.end_s, self._flight_s, self.busy_s, taken = self._run_until(until_s)
        scheduler.kv.take(taken)
        done = scheduler.batch.steps - before
        scheduler.tokens_out += done * len(scheduler.batch.members)
        self.steps_done += done

    def step_ended(self, now_s: float) -> StepEnd:
        """The step in flight, which ends now, is done: hand out its tokens and start the next."""
        self.catch_up(now_s)
        assert self.end_s == now_s, f"{self.instance_id} was woken at {now_s} s, its step ends at {self.end_s} s"
        self.steps_done += 1
        self.busy_s += self._flight_s
        end = self.scheduler.complete(self._plan, now_s)
        self._start_step(now_s)
        return end

    def _start_step(self, now_s: float) -> None:
        scheduler = self.scheduler
        self._wake_s = None
        self._plan = plan = scheduler.plan(now_s)
        batch = scheduler.batch
        decodes = len(batch.members)
        if not decodes and not plan.chunks:
            self.end_s = IDLE
            self._cruising = False
            return
        batch.refresh()
        self._flight_s = step_time_s(
            self._coefficients,
            decodes,
            batch.base_sum + decodes * batch.steps,
            batch.base_max + batch.steps if decodes else 0,
            float(plan.prefill_tokens),
            plan.attention_tokens,
        )
        self.end_s = now_s + self._flight_s
        self._cruising = self._fast_forward and not plan.chunks and not plan.preempted and not scheduler.watches_batch()

    def _changed(self, now_s: float, *, stop_cruise: bool) -> None:
        """Something changed: recompute the wake-up; an idle instance may have work."""
        if not self.alive:
            return
        self._wake_s = None
        if stop_cruise:
            self._cruising = False
        if self.idle:
            self._start_step(now_s)

    def push(self, request: SimRequest, now_s: float) -> None:
        """Queue a request."""
        # Nothing moves behind a head that does not fit until the running requests change.
        is_head = self.scheduler.push(request)
        self._changed(now_s, stop_cruise=is_head)

    def remove(self, request: SimRequest, now_s: float) -> None:
        """Take a request out wherever it is here; it is unplaced afterwards."""
        self.scheduler.remove(request)
        self._changed(now_s, stop_cruise=True)

    def reserve(self, migration_id: MigrationId, length_tokens: int, now_s: float) -> Refusal | None:
        """Reserve room for a request migrating here. Returns why not, or None."""
        refused = self.scheduler.reserve(migration_id, length_tokens)
        self._changed(now_s, stop_cruise=False)
        return refused

    def unreserve(self, migration_id: MigrationId, now_s: float) -> None:
        """Release a reservation, if there is one."""
        self.scheduler.unreserve(migration_id)
        self._changed(now_s, stop_cruise=bool(self.scheduler.waiting))

    def full_block_tokens(self, request: SimRequest) -> int:
        """Tokens in the full blocks of a request that decodes here, all of them computed; 0 if it does not decode."""
        if request.phase is not Phase.DECODE:
            return 0
        block_size = self.scheduler.capacity.block_size_tokens
        return (self.scheduler.length_of(request) - 1) // block_size * block_size

    def request_cut(self, request: SimRequest, now_s: float) -> Refusal | None:
        """Cut a request when the step in flight ends. Returns why not, or None."""
        refused = self.scheduler.request_cut(request)
        if refused is None:
            self._changed(now_s, stop_cruise=True)
        return refused

    def undo_cut(self, request: SimRequest) -> bool:
        """Take back a cut that has not taken effect. Returns whether there was one."""
        return self.scheduler.undo_cut(request)

    def unpin(self, request_id: RequestId, now_s: float) -> None:
        """Free the blocks of a request that was cut, if they are still pinned."""
        self.scheduler.unpin(request_id)
        self._changed(now_s, stop_cruise=bool(self.scheduler.waiting))

    def expect(self, request: SimRequest, migration_id: MigrationId, now_s: float) -> int:
        """Turn a reservation into a cut request's blocks. Returns the tokens to pull."""
        tokens = self.scheduler.expect(request, migration_id)
        self._changed(now_s, stop_cruise=bool(self.scheduler.waiting))
        return tokens

    def resume(self, request: SimRequest, now_s: float) -> None:
        """The pull is done: the request decodes from the next step on."""
        self.scheduler.resume(request)
        self._changed(now_s, stop_cruise=True)

    def watch(self, request: SimRequest) -> None:
        """Make `step_ended` report the next token of this request."""
        self.scheduler.watch(request)

    def crash(self) -> None:
        """Stop for good; the step in flight is lost."""
        self.alive = False
        self._cruising = False
        self.end_s = IDLE
        self._wake_s = IDLE

    def report(self) -> InstanceReport:
        """The current load, between two steps."""
        scheduler = self.scheduler
        batch = scheduler.batch
        if self._ids_of_change != batch.changes:
            self._ids = tuple([request.request_id for request in batch.members])
            self._ids_of_change = batch.changes
        ids = self._ids
        steps = batch.steps
        tokens = tuple([request.base + steps for request in batch.members])
        if scheduler.prefilling or scheduler.joining:
            others = [*scheduler.prefilling, *scheduler.joining]
            ids += tuple([request.request_id for request in others])
            tokens += tuple([request.settled_tokens for request in others])
        waiting_ids: tuple[RequestId, ...] = ()
        waiting_tokens: tuple[int, ...] = ()
        if scheduler.waiting:
            queue = [entry[2] for entry in sorted(scheduler.waiting, key=lambda entry: entry[:2])]
            waiting_ids = tuple([request.request_id for request in queue])
            waiting_tokens = tuple([request.settled_tokens for request in queue])
        done = self.steps_done - self._reported_steps
        step_s = (self.busy_s - self._reported_busy_s) / done if done else 0.0
        self._reported_steps = self.steps_done
        self._reported_busy_s = self.busy_s
        return InstanceReport(
            ids,
            tokens,
            waiting_ids,
            waiting_tokens,
            scheduler.kv.blocks - scheduler.kv.free_blocks,
            step_s,
        )
