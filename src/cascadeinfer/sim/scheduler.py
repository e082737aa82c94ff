"""
What one instance runs in each step: continuous batching as in vLLM V1.

Rules, in the order in which a step is planned:
1. Running requests come first. Each decoding request gets one token, and a new block when it crosses a block boundary.
2. Prompts in progress get what is left of the token budget, oldest first (chunked prefill).
3. If a running request finds no block, the running request with the highest priority number, latest admitted among
   equals, is preempted: its blocks are freed, and it goes to the head of the queue to be recomputed with all its
   tokens.
4. Waiting requests are admitted in order of (priority, arrival), preempted ones first, while budget, batch slots and
   blocks last. The head must fit whole (vLLM's `scheduler_reserve_full_isl`), and nothing overtakes a head that does
   not. A step that preempted admits nothing.
Source: vLLM 0.32 `v1/core/sched/scheduler.py`. Differences: decodes are planned before prompts wherever they stand in
the running list, and only hashes in the trace are shared (vLLM also hashes output tokens).

A migration holds room here: `reserved` blocks and a slot from the ask on, `pulling` while the KV cache is in transit,
and at the source `pinned` blocks from the cut until the pull is done. A request that is `parked` with its first token
has pinned blocks too, and no slot.
"""

import math
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, MigrationId, RequestId
from cascadeinfer.sim.batch import DecodeBatch
from cascadeinfer.sim.kvcache import KvCache
from cascadeinfer.sim.requests import Phase, SimRequest
from cascadeinfer.sim.steps import StepEnd, StepPlan


class Scheduler:
    """Queue, batch and blocks of one instance. See the module header."""

    def __init__(self, capacity: InstanceCapacity, blocks_per_unit: int = 0) -> None:
        """
        Args:
            capacity: Blocks, slots and token budget.
            blocks_per_unit: Blocks that one prefix hash covers; 0 turns prefix caching off.
        """
        self.capacity = capacity
        self.unit_tokens = blocks_per_unit * capacity.block_size_tokens
        self.kv = KvCache(capacity.kv_blocks, blocks_per_unit)
        self.batch = DecodeBatch(capacity.max_num_seqs, capacity.block_size_tokens)
        self.waiting: list[tuple[int, int, SimRequest]] = []
        self.waiting_blocks = 0
        self.prefilling: list[SimRequest] = []
        self.joining: list[SimRequest] = []
        self.pulling: dict[RequestId, SimRequest] = {}
        self.reserved: dict[MigrationId, int] = {}
        self.pinned: dict[RequestId, tuple[int, list[int]]] = {}
        self.parked: dict[RequestId, SimRequest] = {}
        self.cut_requested: dict[RequestId, SimRequest] = {}
        self.watched: dict[RequestId, SimRequest] = {}
        self.tokens_out = 0
        self._next_back = 0
        self._next_front = -1
        self._admissions = 0

    def push(self, request: SimRequest) -> bool:
        """Queue a request to compute all tokens it has. Returns whether it is the queue's head."""
        self._enqueue(request, self._next_back)
        self._next_back += 1
        return self.waiting[0][2] is request

    def _enqueue(self, request: SimRequest, place: int) -> None:
        request.phase = Phase.WAITING
        request.computed = 0
        request.goal = request.settled_tokens
        self.waiting_blocks += self.capacity.blocks_for(request.goal)
        heappush(self.waiting, (request.priority, place, request))

    def running_count(self) -> int:
        """Running requests."""
        return len(self.batch.members) + len(self.prefilling) + len(self.joining)

    def slots_taken(self) -> int:
        """Running requests, plus slots kept for requests on their way."""
        return self.running_count() + len(self.pulling) + len(self.reserved)

    def requests(self) -> Iterator[SimRequest]:
        """All requests here, running ones first."""
        yield from self.batch.members
        yield from self.prefilling
        yield from self.joining
        yield from self.pulling.values()
        yield from self.parked.values()
        yield from (request for _, _, request in sorted(self.waiting, key=lambda entry: entry[:2]))

    def length_of(self, request: SimRequest) -> int:
        """Length of a request that is here."""
        return self.batch.length_of(request) if request.phase is Phase.DECODE else request.settled_tokens

    def plan(self, now_s: float) -> StepPlan:
        """Decide what the next step computes and take the blocks for it."""
        plan = StepPlan()
        for request in self.joining:
            request.phase = Phase.DECODE
            self.batch.add(request)
        self.joining.clear()
        plan.preempted = self._grow_decodes()
        budget = self.capacity.max_batched_tokens - len(self.batch.members)
        budget -= self._continue_prompts(plan, budget)
        if not plan.preempted:
            self._admit(plan, budget, now_s)
        elif not self.batch.members and not plan.chunks:
            return self.plan(now_s)  # everything was preempted: nothing runs, so this plan may admit
        return plan

    def _grow_decodes(self) -> bool:
        needed = self.batch.blocks_needed()
        if needed <= self.kv.free_blocks:
            self.kv.take(needed)
            return False
        granted: set[RequestId] = set()
        for request in sorted(self.batch.members, key=lambda member: member.admission):
            if request.phase is not Phase.DECODE or not self.batch.crosses(request):
                continue
            while self.kv.free_blocks == 0:
                victim = self._victim()
                self._preempt(victim, next_token_has_block=victim.request_id in granted)
                if victim is request:
                    break
            else:
                self.kv.take(1)
                granted.add(request.request_id)
        return True

    def _continue_prompts(self, plan: StepPlan, budget_tokens: int) -> int:
        for request in list(self.prefilling):
            if request.phase is not Phase.PREFILL or plan.prefill_tokens >= budget_tokens:
                continue
            chunk = min(request.goal - request.computed, budget_tokens - plan.prefill_tokens)
            needed = self.capacity.blocks_for(request.computed + chunk) - request.blocks
            while self.kv.free_blocks < needed:
                victim = self._victim()
                plan.preempted = True
                self._preempt(victim, next_token_has_block=True)
                if victim is request:
                    break
            else:
                self._compute(plan, request, chunk, needed)
        if plan.preempted:  # a request that already had a chunk may be gone
            chunks = [(request, chunk) for request, chunk in plan.chunks if request.phase is Phase.PREFILL]
            plan.chunks, plan.prefill_tokens, plan.attention_tokens = [], 0, 0.0
            for request, chunk in chunks:
                plan.compute(request, chunk)
        return plan.prefill_tokens

    def _admit(self, plan: StepPlan, budget_tokens: int, now_s: float) -> None:
        spent = 0
        while self.waiting and spent < budget_tokens and self.slots_taken() < self.capacity.max_num_seqs:
            request = self.waiting[0][2]
            found = idle = 0
            if self.unit_tokens:
                found, idle = self.kv.hits(request.prefix_hashes, (request.goal - 1) // self.unit_tokens)
            hit_blocks = found * self.kv.blocks_per_unit
            whole = self.capacity.blocks_for(request.goal)
            if whole - hit_blocks > self.kv.free_blocks - idle * self.kv.blocks_per_unit:
                return
            heappop(self.waiting)
            self.waiting_blocks -= whole
            request.units = list(request.prefix_hashes[:found])
            self.kv.hold(request.units)
            request.phase = Phase.PREFILL
            request.blocks = hit_blocks
            request.computed = found * self.unit_tokens
            request.prefix_hit_tokens += request.computed
            request.recomputed_tokens += max(0, request.lost_tokens - request.computed)
            if math.isnan(request.scheduled_s):
                request.scheduled_s = now_s
            self._number(request)
            self.prefilling.append(request)
            plan.admitted = True
            chunk = min(request.goal - request.computed, budget_tokens - spent)
            spent += chunk
            needed = self.capacity.blocks_for(request.computed + chunk) - request.blocks
            self._compute(plan, request, chunk, needed)

    def _compute(self, plan: StepPlan, request: SimRequest, chunk_tokens: int, new_blocks: int) -> None:
        self.kv.take(new_blocks)
        request.blocks += new_blocks
        plan.compute(request, chunk_tokens)
        if self.unit_tokens:
            self._publish(request, request.computed, request.computed + chunk_tokens)

    def _publish(self, request: SimRequest, from_tokens: int, to_tokens: int) -> None:
        """Share the whole units of the prompt that end in `(from, to]`."""
        for unit in request.prefix_hashes[from_tokens // self.unit_tokens : to_tokens // self.unit_tokens]:
            if self.kv.publish(unit):
                request.units.append(unit)

    def _number(self, request: SimRequest) -> None:
        request.admission = self._admissions
        self._admissions += 1

    def _victim(self) -> SimRequest:
        running = [*self.batch.members, *self.prefilling]
        return max(running, key=lambda request: (request.priority, request.admission))

    def _preempt(self, request: SimRequest, *, next_token_has_block: bool) -> None:
        self._leave(request, next_token_has_block=next_token_has_block)
        request.preemptions += 1
        self._enqueue(request, self._next_front)
        self._next_front -= 1

    def _leave(self, request: SimRequest, *, next_token_has_block: bool) -> None:
        """Remove a running request and free its blocks."""
        if request.phase is Phase.DECODE:
            computed = self.batch.length_of(request) - (0 if next_token_has_block else 1)
            self.batch.remove(request)
            blocks = self.capacity.blocks_for(computed)
            request.lost_tokens = request.settled_tokens - 1
        else:
            self.prefilling.remove(request)
            blocks = request.blocks
            request.lost_tokens = request.computed
        self._free(blocks, request.units)
        request.blocks, request.units = 0, []

    def _free(self, blocks: int, units: list[int]) -> None:
        self.kv.give(blocks - len(units) * self.kv.blocks_per_unit)
        self.kv.release(units)

    def complete(self, plan: StepPlan, now_s: float) -> StepEnd:
        """Hand out the step's tokens: one per decoding request, and the next one of each prompt that is complete."""
        end = StepEnd()
        if self.batch.members:
            self.batch.steps += 1
            self.tokens_out += len(self.batch.members)
        for request in self.batch.finished():
            self._finish(request, now_s, end)
        if self.watched or self.cut_requested:
            self._see_and_cut(end)
        for request, chunk_tokens in plan.chunks:
            if request.phase is Phase.PREFILL and request in self.prefilling:
                request.computed += chunk_tokens
                if request.computed == request.goal:
                    self._first_token(request, now_s, end)
        return end

    def _see_and_cut(self, end: StepEnd) -> None:
        for request in list(self.watched.values()):
            if request.phase is Phase.DECODE or request.phase is Phase.FINISHED:
                self._seen(request, end)
        for request in self.cut_requested.values():
            if request.phase is Phase.DECODE:
                self._cut(request)
                end.cut.append(request)
        self.cut_requested.clear()

    def _first_token(self, request: SimRequest, now_s: float, end: StepEnd) -> None:
        request.produced += 1
        self.tokens_out += 1
        if math.isnan(request.first_token_s):
            request.first_token_s = now_s
        if request.watched:
            self._seen(request, end)
        if request.produced == request.output_tokens:
            self._finish(request, now_s, end)
            return
        self.prefilling.remove(request)
        if request.armed:
            self._park(request)
            end.parked.append(request)
            return
        request.phase = Phase.DECODE
        self.batch.add(request)

    def _park(self, request: SimRequest) -> None:
        request.armed = False
        request.phase = Phase.PARKED
        request.lost_tokens = request.computed
        self.pinned[request.request_id] = (request.blocks, request.units)
        self.parked[request.request_id] = request
        request.blocks, request.units = 0, []

    def _seen(self, request: SimRequest, end: StepEnd) -> None:
        request.watched = False
        del self.watched[request.request_id]
        end.watched.append(request)

    def _finish(self, request: SimRequest, now_s: float, end: StepEnd) -> None:
        self._leave(request, next_token_has_block=False)
        request.phase = Phase.FINISHED
        request.finish_s = now_s
        end.finished.append(request)

    def _cut(self, request: SimRequest) -> None:
        blocks = self.capacity.blocks_for(self.batch.length_of(request) - 1)
        self.batch.remove(request)
        request.lost_tokens = request.settled_tokens - 1
        request.phase = Phase.PULLING
        self.pinned[request.request_id] = (blocks, request.units)
        request.units = []

    def watch(self, request: SimRequest) -> None:
        """Report this request's next token in `StepEnd.watched`."""
        request.watched = True
        self.watched[request.request_id] = request

    def watches_batch(self) -> bool:
        """Whether the next token of a member of the batch is watched."""
        return bool(self.watched) and any(request.phase is Phase.DECODE for request in self.watched.values())

    def reserve(self, migration_id: MigrationId, length_tokens: int) -> Refusal | None:
        """
        Reserve a slot and blocks for a request; prompts in progress and the queue come first.

        Returns:
            Why not, or None.
        """
        if self.slots_taken() + len(self.waiting) >= self.capacity.max_num_seqs:
            return Refusal.NO_SLOT
        blocks = self.capacity.blocks_for(length_tokens)
        promised = sum(self.capacity.blocks_for(request.goal) - request.blocks for request in self.prefilling)
        if blocks + self.waiting_blocks + promised > self.kv.free_blocks:
            return Refusal.NO_BLOCKS
        self.kv.take(blocks)
        self.reserved[migration_id] = blocks
        return None

    def unreserve(self, migration_id: MigrationId) -> None:
        """Release a reservation, if there is one."""
        self.kv.give(self.reserved.pop(migration_id, 0))

    def request_cut(self, request: SimRequest) -> Refusal | None:
        """Cut a decoding request at the end of the step in flight. Returns why not, or None."""
        if request.phase is Phase.PREFILL:
            return Refusal.PREFILLING
        if request.phase is not Phase.DECODE:
            return Refusal.WAITING
        self.cut_requested[request.request_id] = request
        return None

    def undo_cut(self, request: SimRequest) -> bool:
        """Undo a cut that has not taken effect. Returns whether there was one."""
        return self.cut_requested.pop(request.request_id, None) is not None

    def unpin(self, request_id: RequestId) -> None:
        """Free the blocks of a request that was cut, if they are still pinned."""
        blocks, units = self.pinned.pop(request_id, (0, []))
        self._free(blocks, units)

    def unpark(self, request: SimRequest) -> None:
        """A parked request goes to a target that pulls its blocks, which stay pinned until then."""
        del self.parked[request.request_id]
        request.phase = Phase.PULLING

    def expect(self, request: SimRequest, migration_id: MigrationId) -> int:
        """
        Turn a reservation into the blocks of a cut request.

        Returns:
            Tokens to pull: all it has but the last, less what is cached here.
        """
        tokens = request.settled_tokens - 1
        found = self.kv.hits(request.prefix_hashes, tokens // self.unit_tokens)[0] if self.unit_tokens else 0
        hit_blocks = found * self.kv.blocks_per_unit
        request.blocks = self.capacity.blocks_for(tokens)
        surplus = self.reserved.pop(migration_id) - (request.blocks - hit_blocks)
        assert surplus >= 0, "a cut is refused when the request has outgrown its reservation"
        self.kv.give(surplus)
        request.units = list(request.prefix_hashes[:found])
        self.kv.hold(request.units)
        self.pulling[request.request_id] = request
        return tokens - found * self.unit_tokens

    def resume(self, request: SimRequest) -> None:
        """The pull is done: decode from the next step on."""
        del self.pulling[request.request_id]
        request.phase = Phase.JOINING
        if self.unit_tokens:
            self._publish(request, len(request.units) * self.unit_tokens, request.settled_tokens - 1)
        self._number(request)
        self.joining.append(request)

    def remove(self, request: SimRequest) -> None:
        """Remove a request wherever it is, e.g. because its client left."""
        self.cut_requested.pop(request.request_id, None)
        self.watched.pop(request.request_id, None)
        request.watched = False
        if request.phase is Phase.DECODE or request.phase is Phase.PREFILL:
            self._leave(request, next_token_has_block=True)
        elif request.phase is Phase.WAITING:
            self.waiting = [entry for entry in self.waiting if entry[2] is not request]
            heapify(self.waiting)
            self.waiting_blocks -= self.capacity.blocks_for(request.goal)
        elif request.phase is Phase.PARKED:
            del self.parked[request.request_id]
            self.unpin(request.request_id)
        elif request.phase in {Phase.JOINING, Phase.PULLING}:
            if request.phase is Phase.JOINING:
                self.joining.remove(request)
            else:
                del self.pulling[request.request_id]
            self._free(request.blocks, request.units)
        request.blocks, request.units = 0, []
        request.phase = Phase.UNPLACED
