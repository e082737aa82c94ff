"""
A simulated instance without time or I/O: requests, blocks, cuts, pins, reservations, pulls.

It imitates one vLLM EngineCore with our connector (`engines/vllm/connector/scheduler_side.py` has the rules) as the
runtime sees it. Every step takes the same time: the package's header says what this is not.

Theory of operation. Blocks are counted, not stored; a sequence's KV cache is its digest (`model.py`). A pull copies the
digest. What is pulled after its lease has ended is garbage, because the real source may have given the blocks to
another request by then; the target therefore discards a pull that ends after its deadline (`Resume.pull_before_s`).
Each step gives every running request its tokens within the budget (long prompts in chunks), preempting the youngest
when blocks run out, then admits waiting requests in order.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.refusals import Refusal, why_not_step_budget
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import EngineCounters, EngineRequest, Resume
from cascadeinfer.engines.simulated.model import (
    SimulatedDelta,
    SimulatedParams,
    SimulatedTicket,
    SimulatedTimes,
    fold,
    next_token,
)
from cascadeinfer.engines.simulated.precopies import Precopies
from cascadeinfer.engines.simulated.sequence import Pin, Sequence, batch_of, names_and_lengths

RESERVATION_LIFE_S: Final = 60.0
_GARBAGE: Final = 0xBAD


@dataclass(slots=True)
class SimulatedCore:
    """
    One instance's state. Each method is atomic; `now_s` is any clock that all connected instances share.

    Attributes:
        core_id: Differs between incarnations of an instance.
        alive: Whether its process lives: only then can its pins be read.
        readable: Finds a connected peer by its `core_id`.
        step_budget: Tokens of a step, if they were limited further than by `capacity`.
        apart_from: Peers, by `core_id`, that it cannot reach: what it reads from them hangs (fault injection).
        spoiled_cuts: Number of coming cuts that find no KV cache (fault injection).
        stale_reads: Pulls that this instance used although the lease had ended before they were over.
    """

    core_id: str
    capacity: InstanceCapacity
    times: SimulatedTimes
    max_model_len: int
    readable: Callable[[str], "SimulatedCore | None"]
    alive: bool = True
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    pins: dict[str, Pin] = field(default_factory=dict)
    expired: set[str] = field(default_factory=set)
    reservations: dict[str, tuple[int, float]] = field(default_factory=dict)
    precopies: Precopies = field(default_factory=Precopies)
    step_budget: int | None = None
    apart_from: set[str] = field(default_factory=set)
    spoiled_cuts: int = 0
    stale_reads: int = 0
    steps: int = 0
    scheduled_tokens: int = 0
    pulls: int = 0
    pulled_tokens: int = 0
    precopied_tokens: int = 0
    failed_pulls: int = 0
    preemptions: int = 0
    step_s: float = 0.0
    samples: deque[StepSample] = field(default_factory=lambda: deque(maxlen=1024))

    # --- commands ----------------------------------------------------------------------------------------------------

    def add(self, engine_request_id: str, request: EngineRequest, resume: Resume | None, *, park: bool = False) -> None:
        """Queue a new or resumed request; with `park`, its cut is armed."""
        params = request.payload if isinstance(request.payload, SimulatedParams) else SimulatedParams()
        output = resume.output_token_ids if resume is not None else []
        sequence = Sequence(
            engine_request_id,
            request.prompt_token_ids + output,
            len(request.prompt_token_ids),
            request.max_output_tokens,
            params.stop_token_ids,
            request.max_output_tokens,
        )
        if resume is not None:
            assert resume.ticket is None or isinstance(resume.ticket, SimulatedTicket)
            if resume.ticket is not None and resume.ticket.n_tokens > 0:
                sequence.ticket = resume.ticket
            if resume.reservation_id is not None:
                if (copied := self.precopies.take(resume.reservation_id, sequence.ticket)) is not None:
                    sequence.copied_tokens, sequence.copied_digest = copied
                    self.precopied_tokens += copied.n_tokens
                self.release_reservation(resume.reservation_id)
            if resume.pull_before_s is not None:
                sequence.pull_before_s = resume.pull_before_s
        if park and self._can_be_cut_at(sequence, sequence.n_output + 1):
            sequence.cut = True
            sequence.last_output_tokens = sequence.n_output + 1
        self.waiting.append(sequence)

    def abort(self, engine_request_ids: list[str]) -> None:
        """Forget these requests; ids that are not live are ignored. A cut that has taken effect stays pinned."""
        gone = set(engine_request_ids)
        self.running = [s for s in self.running if s.engine_request_id not in gone]
        self.waiting = [s for s in self.waiting if s.engine_request_id not in gone]

    def cut(self, engine_request_id: str) -> Refusal | None:
        """See `CascadeSchedulerSide.cut`."""
        sequence = self._find(engine_request_id)
        if sequence is None:
            return Refusal.UNKNOWN
        if sequence.cut:
            return Refusal.ALREADY_CUT
        if sequence in self.waiting:
            return Refusal.WAITING
        if sequence.n_output == 0 or sequence.computed < len(sequence.token_ids) - 1:
            return Refusal.PREFILLING
        last = sequence.n_output + 1
        if not self._can_be_cut_at(sequence, last):
            return Refusal.ENDING
        sequence.cut = True
        sequence.last_output_tokens = last
        return None

    def _can_be_cut_at(self, sequence: Sequence, n_output: int) -> bool:
        return n_output < sequence.max_output_tokens and sequence.n_prompt + n_output < self.max_model_len

    def undo_cut(self, engine_request_id: str) -> bool:
        """See `CascadeSchedulerSide.undo_cut`."""
        sequence = self._find(engine_request_id)
        if sequence is None or not sequence.cut:
            return False
        sequence.cut = False
        sequence.last_output_tokens = sequence.max_output_tokens
        return True

    def reserve(self, reservation_id: str, n_tokens: int, now_s: float) -> Refusal | None:
        """See `cascade_reserve`: a slot, and blocks for one more than the tokens fill."""
        self.expire(now_s)
        if len(self.running) + len(self.waiting) + len(self.reservations) >= self.capacity.max_num_seqs:
            return Refusal.NO_SLOT
        n_blocks = self.capacity.blocks_for(n_tokens) + 1
        if reservation_id not in self.reservations:
            if self.free_blocks() < n_blocks:
                return Refusal.NO_BLOCKS
            self.reservations[reservation_id] = n_blocks, now_s + RESERVATION_LIFE_S
        return None

    def release_reservation(self, reservation_id: str) -> None:
        """Free the reserved blocks, if there are any."""
        self.reservations.pop(reservation_id, None)
        self.precopies.keep_only(set(self.reservations))

    def pin_full_blocks(self, engine_request_id: str, now_s: float) -> SimulatedTicket | None:
        """See `FullBlockPins.pin`."""
        if (sequence := next((s for s in self.running if s.engine_request_id == engine_request_id), None)) is None:
            return None
        n_tokens = self.precopies.pin(sequence, self.capacity.block_size_tokens, now_s + self.times.lease_s)
        return SimulatedTicket(self.core_id, engine_request_id, n_tokens, sequence.preempted) if n_tokens else None

    def precopy(self, reservation_id: str, ticket: SimulatedTicket, now_s: float, before_s: float) -> bool:
        """Begin to read full blocks into a reservation; False if there is none that holds them."""
        has_room = self.reservations.get(reservation_id, (0, 0.0))[0] >= self.capacity.blocks_for(ticket.n_tokens)
        return has_room and self.precopies.begin(reservation_id, ticket, now_s + self.times.pull_s, before_s)

    def release_pin(self, engine_request_id: str) -> None:
        """Free a cut request's blocks, if they are pinned."""
        self.pins.pop(engine_request_id, None)

    def renew_pin(self, engine_request_id: str, now_s: float) -> bool:
        """Begin the lease on a cut request's blocks anew; False if they are not pinned any more."""
        self.expire(now_s)
        if (pin := self.pins.get(engine_request_id)) is None:
            return False
        pin.expires_s = max(pin.expires_s, now_s + self.times.lease_s)
        return True

    def set_step_budget(self, n_tokens: int | None) -> int | str:
        """The budget in force from now on, or why it cannot be this one."""
        least, most = self.capacity.max_num_seqs, self.capacity.max_batched_tokens
        if n_tokens is not None and (why_not := why_not_step_budget(n_tokens, least, most)) is not None:
            return why_not
        self.step_budget = n_tokens
        return most if n_tokens is None else n_tokens

    def report(self, now_s: float) -> tuple[InstanceReport, EngineCounters]:
        """The current load and counters."""
        self.expire(now_s)
        report = InstanceReport(
            *names_and_lengths(self.running),
            *names_and_lengths(self.waiting),
            kv_blocks_used=self.capacity.kv_blocks - self.free_blocks(),
            step_s=self.times.step_s if self.running else 0.0,
            steps=tuple(self.samples),
        )
        self.samples.clear()
        counters = EngineCounters(
            steps=self.steps,
            scheduled_tokens=self.scheduled_tokens,
            pulls=self.pulls,
            pulled_tokens=self.pulled_tokens,
            precopied_tokens=self.precopied_tokens,
            reserved=len(self.reservations),
            pinned=len(self.pins),
            failed_pulls=self.failed_pulls,
            held_blocks=self._held_blocks(),
            step_budget=self.step_budget or self.capacity.max_batched_tokens,
        )
        return report, counters

    def free_blocks(self) -> int:
        """Blocks that are not in use."""
        held = sum(s.blocks for s in self.running + self.waiting) + sum(self._held_blocks().values())
        free = self.capacity.kv_blocks - held
        assert free >= 0, f"{self.core_id} holds {held} of {self.capacity.kv_blocks} blocks"
        return free

    def _held_blocks(self) -> dict[str, int]:
        in_use = {s.engine_request_id: s.blocks for s in self.running + self.waiting}
        pins = {request_id: pin.blocks for request_id, pin in self.pins.items()}
        reserved = sum(blocks for blocks, _ in self.reservations.values())
        copied = self.precopies.blocks(in_use | pins)
        return {"reservations": reserved, "pins": sum(pins.values()), "precopies": copied}

    def expire(self, now_s: float) -> None:
        """End expired leases and reservations."""
        self.precopies.expire(now_s)
        for request_id in [r for r, pin in self.pins.items() if pin.expires_s <= now_s]:
            del self.pins[request_id]
            self.expired.add(request_id)
        for reservation_id in [r for r, (_, expires_s) in self.reservations.items() if expires_s <= now_s]:
            self.release_reservation(reservation_id)

    # --- what peers do over the network ------------------------------------------------------------------------------

    def read(self, engine_request_id: str, now_s: float) -> int | None:
        """Serve a peer's pull: the digest, after which the pin is released; None when the read fails."""
        if not self.alive:
            return None
        self.expire(now_s)
        pin = self.pins.pop(engine_request_id, None)
        if pin is None and engine_request_id in self.expired:
            return _GARBAGE
        return None if pin is None else pin.digest

    def renew(self, engine_request_id: str, now_s: float) -> None:
        """Extend a lease for a peer that is going to pull; NIXL extends it by two thirds."""
        self.expire(now_s)
        if (pin := self.pins.get(engine_request_id)) is not None:
            pin.expires_s = max(pin.expires_s, now_s + self.times.lease_s * 2 / 3)

    # --- steps -------------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    def step(self, now_s: float) -> list[SimulatedDelta]:
        """Run one step that ends now; returns its tokens, in order of the running requests."""
        self.expire(now_s)
        self._renew_leases(now_s)
        self.steps += 1
        preemptions = self.preemptions
        scheduled, budget = self._schedule_running()
        if self.preemptions == preemptions:
            scheduled += self._admit(budget, now_s)
        self._time(scheduled)
        deltas: list[SimulatedDelta] = []
        for sequence, n_new in scheduled:
            new_ids = sequence.token_ids[sequence.computed : sequence.computed + n_new]
            sequence.digest = fold(sequence.digest, new_ids)
            sequence.computed += n_new
            self.scheduled_tokens += n_new
            if sequence.computed == len(sequence.token_ids):
                deltas.append(self._sample(sequence, now_s))
        return deltas

    def _time(self, scheduled: list[tuple[Sequence, int]]) -> None:
        """Compute how long a step with this batch takes, and record it for the next report."""
        batch = batch_of(scheduled)
        model = self.times.step_model
        self.step_s = self.times.step_s if model is None else model.step_s(batch)
        if scheduled:
            self.samples.append(StepSample(batch, self.step_s))

    def _renew_leases(self, now_s: float) -> None:
        for sequence in self.waiting:
            if sequence.ticket is not None:
                peer = self.readable(sequence.ticket.core_id)
                if peer is not None and peer.alive:
                    peer.renew(sequence.ticket.request_id, now_s)

    def _schedule_running(self) -> tuple[list[tuple[Sequence, int]], int]:
        budget = self.step_budget or self.capacity.max_batched_tokens
        scheduled: list[tuple[Sequence, int]] = []
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            n_new = min(len(sequence.token_ids) - sequence.computed, budget)
            while not self._hold(sequence, sequence.computed + n_new):
                victim = self.running.pop()
                victim.blocks = victim.computed = victim.digest = 0
                victim.preempted += 1
                self.waiting.insert(0, victim)
                self.preemptions += 1
                if victim is sequence:
                    return scheduled, budget
            scheduled.append((sequence, n_new))
            budget -= n_new
            index += 1
        return scheduled, budget

    def _admit(self, budget: int, now_s: float) -> list[tuple[Sequence, int]]:
        admitted: list[tuple[Sequence, int]] = []
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.capacity.max_num_seqs:
                break
            if sequence.ticket is not None and not self._pulled(sequence, sequence.ticket, now_s):
                if sequence.pull_ends_s is None:
                    break  # no blocks for it; those behind it wait their turn
                continue
            n_new = min(len(sequence.token_ids) - sequence.computed, budget)
            if not self._hold(sequence, sequence.computed + n_new):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            admitted.append((sequence, n_new))
            budget -= n_new
        return admitted

    def _pulled(self, sequence: Sequence, ticket: SimulatedTicket, now_s: float) -> bool:
        """Go on with a pull; True once it has ended, well or not."""
        peer = self.readable(ticket.core_id)
        if sequence.pull_ends_s is None:
            if now_s > sequence.pull_before_s:
                if peer is not None:
                    peer.release_pin(ticket.request_id)
                sequence.ticket = None
                return True
            if not self._hold(sequence, ticket.n_tokens):
                return False
            sequence.pull_ends_s = now_s + self.times.pull_s
            self.pulls += 1
            self.pulled_tokens += ticket.n_tokens - sequence.copied_tokens
        if now_s < sequence.pull_ends_s or ticket.core_id in self.apart_from:
            return False
        digest = peer.read(ticket.request_id, now_s) if peer is not None else None
        sequence.ticket = sequence.pull_ends_s = None
        if digest is None or now_s > sequence.pull_before_s:
            self.failed_pulls += 1
            sequence.computed, sequence.digest = sequence.copied_tokens, sequence.copied_digest
        else:
            self.stale_reads += digest == _GARBAGE
            sequence.computed, sequence.digest = ticket.n_tokens, digest
        return True

    def _hold(self, sequence: Sequence, n_tokens: int) -> bool:
        """Allocate the blocks that this many tokens need; False when there are too few."""
        more = self.capacity.blocks_for(n_tokens) - sequence.blocks
        if more > 0 and self.free_blocks() < more:
            return False
        sequence.blocks += max(0, more)
        return True

    def _sample(self, sequence: Sequence, now_s: float) -> SimulatedDelta:
        token_id = next_token(sequence.digest)
        sequence.token_ids.append(token_id)
        delta = SimulatedDelta(sequence.engine_request_id, [token_id])
        full = sequence.n_output >= sequence.max_output_tokens or len(sequence.token_ids) >= self.max_model_len
        if token_id in sequence.stop_token_ids:
            delta.finish_reason = "stop"
        elif full or sequence.n_output >= sequence.last_output_tokens:
            delta.finish_reason = "length"
            if not full:
                delta.kv_transfer_params = self._pin(sequence, now_s)
        if delta.finish_reason is not None:
            self.running.remove(sequence)
        return delta

    def _pin(self, sequence: Sequence, now_s: float) -> SimulatedTicket:
        if self.spoiled_cuts:
            self.spoiled_cuts -= 1
            return SimulatedTicket(self.core_id, sequence.engine_request_id, 0)
        self.pins[sequence.engine_request_id] = Pin(sequence.digest, sequence.blocks, now_s + self.times.lease_s)
        return SimulatedTicket(self.core_id, sequence.engine_request_id, sequence.computed, sequence.preempted)

    def _find(self, engine_request_id: str) -> Sequence | None:
        return next((s for s in self.running + self.waiting if s.engine_request_id == engine_request_id), None)
