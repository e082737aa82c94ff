"""What runs in a step: vLLM V1's scheduling rules, case by case."""

from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.requests import Phase, SimRequest
from cascadeinfer.sim.scheduler import Scheduler
from cascadeinfer.sim.steps import StepEnd, StepPlan


def request(name: str, prompt: int, output: int, *, priority: int = 0, hashes: tuple[int, ...] = ()) -> SimRequest:
    """A new request."""
    return SimRequest(name, 0, 0.0, prompt, output, hashes, priority)


def scheduler(blocks: int = 100, *, seqs: int = 8, budget: int = 16, block_size: int = 4, unit: int = 0) -> Scheduler:
    """A small instance."""
    return Scheduler(InstanceCapacity(blocks, block_size, seqs, budget), unit)


def step(s: Scheduler) -> tuple[StepPlan, StepEnd]:
    """Run one whole step."""
    plan = s.plan(0.0)
    return plan, s.complete(plan, 0.0)


def chunks(plan: StepPlan) -> list[tuple[str, int]]:
    """The number of prompt tokens that each request computes."""
    return [(r.request_id, tokens) for r, tokens in plan.chunks]


def test_prompts_are_cut_to_the_budget_and_decodes_come_first() -> None:
    """A prompt of 20 takes 16 tokens of budget, then 4; the next prompt gets the rest; a decode costs one token."""
    s = scheduler()
    for r in (request("a", 20, 5), request("b", 30, 5)):
        s.push(r)
    assert chunks(step(s)[0]) == [("a", 16)]
    assert chunks(step(s)[0]) == [("a", 4), ("b", 12)]
    assert chunks(step(s)[0]) == [("b", 15)], "a decodes now"
    assert chunks(step(s)[0]) == [("b", 3)]
    assert {r.request_id for r in s.batch.members} == {"a", "b"}


def test_attention_of_a_chunk_counts_the_context_before_it() -> None:
    """A chunk of c after s computed tokens attends to c * s + c * (c + 1) / 2."""
    s = scheduler()
    s.push(request("a", 20, 5))
    assert step(s)[0].attention_tokens == 16 * 17 / 2
    assert step(s)[0].attention_tokens == 4 * 16 + 4 * 5 / 2


def test_tokens_of_a_request_come_one_per_step_to_the_last() -> None:
    """The step that completes the prefill gives the first token; an output of 3 needs two more steps."""
    s = scheduler()
    a = request("a", 4, 3)
    s.push(a)
    ends = [step(s)[1] for _ in range(3)]
    assert [len(end.finished) for end in ends] == [0, 0, 1]
    assert (a.phase, a.produced, s.tokens_out) == (Phase.FINISHED, 3, 3)
    assert s.kv.free_blocks == 100


def test_a_head_that_does_not_fit_whole_is_not_overtaken() -> None:
    """Of 10 blocks a holds 8; b needs 3 and waits, and c, which would fit, waits behind it."""
    s = scheduler(blocks=10, budget=64)
    for r in (request("a", 32, 9), request("b", 12, 5), request("c", 4, 5)):
        s.push(r)
    assert chunks(step(s)[0]) == [("a", 32)]
    assert [entry[2].request_id for entry in s.waiting] == ["b", "c"]


def test_slots_limit_the_batch_and_reservations_take_slots() -> None:
    """With 2 slots, one of them reserved for an incoming request, one request runs."""
    s = scheduler(seqs=2)
    assert s.reserve("m", 4) is None
    s.push(request("a", 4, 5))
    s.push(request("b", 4, 5))
    assert chunks(step(s)[0]) == [("a", 4)]
    s.unreserve("m")
    assert chunks(step(s)[0]) == [("b", 4)]


def test_the_latest_is_preempted_and_comes_back_first_with_all_its_tokens() -> None:
    """Two requests fill 4 blocks; when the first needs a fifth, the second is recomputed later, prompt and output."""
    s = scheduler(blocks=4, budget=64)
    a, b = request("a", 7, 9), request("b", 7, 9)
    for r in (a, b, request("c", 3, 3)):
        s.push(r)
    step(s)
    step(s)  # both have 9 tokens; 8 are computed, the ninth needs a block each
    plan, _ = step(s)
    assert plan.preempted
    assert (b.phase, b.preemptions, b.produced, b.goal) == (Phase.WAITING, 1, 2, 9)
    assert [entry[2].request_id for entry in sorted(s.waiting, key=lambda e: e[:2])] == ["b", "c"]
    assert [r.request_id for r in s.batch.members] == ["a"]
    while a.phase is not Phase.FINISHED:
        step(s)
    plan, _ = step(s)
    assert chunks(plan) == [("b", 9), ("c", 3)]
    assert b.produced == 3
    assert b.recomputed_tokens == 8


def test_the_highest_priority_number_is_preempted_first() -> None:
    """Priority outranks the order of admission: the earlier but less urgent request is preempted."""
    s = scheduler(blocks=4, budget=64)
    a, b = request("a", 7, 9, priority=5), request("b", 7, 9)
    s.push(a)
    step(s)
    s.push(b)
    for _ in range(3):
        step(s)
    assert (a.phase, b.phase) == (Phase.WAITING, Phase.DECODE)


def test_lower_priority_numbers_are_admitted_first() -> None:
    """The queue is ordered by priority, then by arrival."""
    s = scheduler(budget=4, seqs=4)
    for r in (request("a", 4, 2, priority=1), request("b", 4, 2), request("c", 4, 2)):
        s.push(r)
    admitted = []
    for _ in range(4):
        admitted += [name for name, _ in chunks(step(s)[0])]
    assert admitted[:2] == ["b", "c"]


def test_a_request_alone_that_finds_no_block_waits_for_pinned_ones() -> None:
    """If pinned blocks leave too few, the last running request preempts itself and resumes once they are free."""
    s = scheduler(blocks=4, budget=64)
    a = request("a", 4, 12)
    s.push(a)
    step(s)
    s.kv.take(2)
    for _ in range(4):
        step(s)
    step(s)
    assert a.phase is Phase.WAITING
    assert step(s)[0].chunks == []
    s.kv.give(2)
    step(s)
    assert a.phase is Phase.DECODE
    assert a.produced == 6


def test_a_shared_prefix_is_computed_once() -> None:
    """The second prompt of 12 tokens with the same two hashed units of 4 computes only the last 4."""
    s = scheduler(unit=1, budget=64)
    a, b = request("a", 12, 5, hashes=(1, 2, 3)), request("b", 12, 5, hashes=(1, 2, 9))
    s.push(a)
    step(s)
    used = 100 - s.kv.free_blocks
    s.push(b)
    plan, _ = step(s)
    assert chunks(plan) == [("b", 4)]
    assert b.prefix_hit_tokens == 8
    assert 100 - s.kv.free_blocks == used + 1 + 1  # b's own block, and a's fourth for its first decode


def test_a_wholly_cached_prompt_still_computes_its_last_unit() -> None:
    """At least one prompt token must be computed to get the next token."""
    s = scheduler(unit=1, budget=64)
    for name in "ab":
        s.push(request(name, 8, 3, hashes=(1, 2)))
        plan, _ = step(s)
    assert chunks(plan) == [("b", 4)]


def test_room_is_refused_to_movers_while_a_queue_wants_it() -> None:
    """A reservation needs a slot, and blocks beyond those that the queue and running prefills will take."""
    s = scheduler(blocks=10, seqs=2, budget=4)
    s.push(request("a", 20, 3))
    step(s)  # 1 block of 5
    assert s.reserve("m", 24) == "no_blocks"
    assert s.reserve("m", 20) is None
    assert s.reserve("n", 1) == "no_slot"


def test_a_cut_request_leaves_with_its_blocks_pinned() -> None:
    """The cut takes effect at the end of the step, with one more token; computed blocks stay until unpinned."""
    s = scheduler()
    a = request("a", 7, 9)
    s.push(a)
    step(s)
    plan = s.plan(0.0)
    assert s.request_cut(a) is None
    end = s.complete(plan, 0.0)
    assert end.cut == [a]
    assert (a.produced, a.settled_tokens) == (2, 9)
    assert s.pinned["a"] == (2, [])
    assert s.kv.free_blocks == 98
    s.unpin("a")
    s.unpin("a")
    assert s.kv.free_blocks == 100


def test_a_cut_is_refused_unless_the_request_decodes() -> None:
    """A request that waits or is in prefill has no token stream to cut."""
    s = scheduler()
    a = request("a", 20, 9)
    s.push(a)
    assert s.request_cut(a) == "waiting"
    step(s)
    assert s.request_cut(a) == "prefilling"


def test_a_finish_beats_the_cut() -> None:
    """If the step that the cut waits for brings the last token, the request is finished and nothing is pinned."""
    s = scheduler()
    a = request("a", 4, 2)
    s.push(a)
    step(s)
    plan = s.plan(0.0)
    s.request_cut(a)
    end = s.complete(plan, 0.0)
    assert (end.finished, end.cut, s.pinned) == ([a], [], {})


def test_removing_anybody_anywhere_frees_everything() -> None:
    """Whether waiting, computing, decoding, pulling or joining, all blocks are free afterwards."""
    s = scheduler(blocks=30, seqs=4, budget=8)
    target = scheduler(blocks=30)
    a, b, c, d = (request(name, 10, 9) for name in "abcd")
    for r in (a, b, c, d):
        s.push(r)
    for _ in range(3):
        step(s)
    plan = s.plan(0.0)
    s.request_cut(a)
    s.complete(plan, 0.0)
    target.reserve("m", 20)
    target.expect(a, "m")
    target.resume(a)
    target.remove(a)
    assert target.kv.free_blocks == 30
    s.unpin("a")
    for r in (b, c, d):
        s.remove(r)
    assert s.kv.free_blocks == 30
    assert not list(s.requests())
    assert s.waiting_blocks == 0
