"""
Explicit moves between real instances leave a request's greedy output unchanged, wherever and whenever it is cut.

Each kind of instance (scheduling, prefix caching) is source and target; see `zoo.py`.
"""

import asyncio
import itertools

import pytest
from zoo import (
    BLOCK,
    KINDS,
    MAX_BATCHED_TOKENS,
    MAX_MODEL_LEN,
    OTHER,
    PAIRS,
    Zoo,
    eventually,
    greedy,
    random_prompt,
)

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_many_moves(zoo: Zoo, source: str, target: str) -> None:
    """
    Fifteen moves back and forth leave the greedy output unchanged, and every one pulls the KV cache.

    A request that ends first, because the engines were ahead of this process, is checked too and followed by another.
    """
    prompt, expected = await zoo.window(20, 280)
    for _ in range(10):
        here, there = zoo.instances[source], zoo.instances[target]
        before = [await zoo.counters(instance) for instance in (here, there)]
        attempt = await zoo.start(here, prompt, greedy(280))
        moves = 0
        while moves < 15:
            await attempt.until_output(3)
            moved = await zoo.move(attempt, there)
            if moved is attempt:
                break
            attempt, moves = moved, moves + 1
            here, there = there, here
        await attempt.until_end()
        assert attempt.output == expected
        after = [await zoo.counters(zoo.instances[name]) for name in (source, target)]
        assert sum(c.failed_pulls for c in after) == sum(c.failed_pulls for c in before)
        pulls = sum(c.pulls for c in after) - sum(c.pulls for c in before)
        # What the cache still holds from the last visit is not pulled again: nothing, if N - 1 tokens are whole blocks.
        assert pulls == moves or (moves - pulls <= 4 and (KINDS[source].caches or KINDS[target].caches))
        if moves == 15:
            break
    assert moves == 15


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_every_offset_around_block_boundaries(zoo: Zoo, source: str, target: str) -> None:
    """
    A request may be cut at any length within two tokens of a multiple of the block size.

    Asking for N tokens instead of N - 1 kills the target's process if N - 1 is a multiple and prefix caching is off.
    """
    lengths = {k * BLOCK + offset for k in (1, 2, 4) for offset in (-2, -1, 0, 1, 2)}
    here, there = zoo.instances[source], zoo.instances[target]
    before = await zoo.counters(there)

    async def move_near(length: int, lead: int, *, waits: bool) -> int:
        """Start `lead` tokens below this length; cut at it, or on the way there. Returns the length at the cut."""
        prompt, expected = await zoo.window(length - lead, lead + 24)
        attempt = await zoo.start(here, prompt, greedy(lead + 24), hold_at=length - 1)
        await attempt.until_output(lead - 1 if waits else 2)
        moved = await zoo.move(attempt, there)
        assert attempt.ticket is not None
        assert attempt.ticket.n_tokens == attempt.n_tokens - 1
        assert len(attempt.ticket.params["remote_block_ids"][0]) == -(-(attempt.n_tokens - 1) // BLOCK)
        await moved.until_end()
        assert moved.output == expected
        return attempt.n_tokens

    for lead in range(4, 9):
        await asyncio.gather(*(move_near(length, lead, waits=False) for length in sorted(lengths)))
    cut_at = await asyncio.gather(*(move_near(length, 5, waits=True) for length in sorted(lengths)))
    assert set(cut_at) == lengths
    assert (await zoo.counters(there)).failed_pulls == before.failed_pulls


@pytest.mark.parametrize("target", [name for name, kind in KINDS.items() if kind.caches])
async def test_prefix_cache_of_the_target_is_used(zoo: Zoo, target: str) -> None:
    """Blocks that the target has cached are not pulled again; an empty pull still frees the source's blocks."""
    prompt, expected = await zoo.window(100, 150)
    here, there = zoo.instances[OTHER[target]], zoo.instances[target]
    assert (await zoo.run(there, prompt, greedy(150))).output == expected
    before = await zoo.counters(there)
    attempt = await zoo.start(here, prompt, greedy(150))
    await attempt.until_output(5)
    moved = await (await zoo.move(attempt, there)).until_end()
    assert moved.output == expected
    after = await zoo.counters(there)
    computed = attempt.n_tokens - 1
    assert after.pulled_tokens - before.pulled_tokens == computed % BLOCK


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_recompute(zoo: Zoo, source: str, target: str) -> None:
    """Without a ticket the target recomputes the KV cache, in chunks, among other requests."""
    prompt, expected = await zoo.reference(3 * MAX_BATCHED_TOKENS + 5, 24)
    other_prompt, other_expected = await zoo.window(50, 80)
    here, there = zoo.instances[source], zoo.instances[target]
    before = await zoo.counters(there)
    other = await zoo.start(there, other_prompt, greedy(80))
    attempt = await zoo.start(here, prompt, greedy(24))
    await attempt.until_output(3)
    attempt = await zoo.move(attempt, there, recompute=True)
    await asyncio.gather(attempt.until_end(), other.until_end())
    assert attempt.output == expected
    assert other.output == other_expected
    assert (await zoo.counters(there)).pulls == before.pulls


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("how", ["eos", "stop_token"])
async def test_end_of_sequence_races_the_cut(zoo: Zoo, source: str, how: str) -> None:
    """A request that ends by itself in the step of the cut has ended: no ticket, nothing pinned, the same output."""
    prompt, text = await zoo.window(40, 80)
    at = next(i for i in range(20, 80) if text[i] not in text[:i])
    ending = {"eos_id": text[at]} if how == "eos" else {"stop_token_ids": [text[at]]}
    expected = text[: at + 1]
    here, there = zoo.instances[source], zoo.instances[OTHER[source]]
    accepted_and_ended = moved = 0
    for tries in range(200):
        attempt = await zoo.start(here, prompt, greedy(80, **ending))
        await attempt.until_output(at - tries % 5)
        refused = None if attempt.ended else await here.cut(attempt.engine_request_id)
        await attempt.until_end()
        if attempt.ticket is not None:
            moved += 1
            attempt = await zoo.resume(attempt, there, ticket=attempt.ticket)
        elif refused is None:
            accepted_and_ended += 1
        await attempt.until_end()
        assert attempt.output == expected
        assert attempt.finish_reason is not None
        assert attempt.finish_reason.name == "STOP"
        assert attempt.stop_reason == (None if how == "eos" else text[at])
        if accepted_and_ended and moved:
            break
    assert accepted_and_ended, "the race never happened"
    assert moved


@pytest.mark.parametrize("source", KINDS)
async def test_length_races_the_cut(zoo: Zoo, source: str) -> None:
    """However close to `max_tokens` a request is cut, it gets exactly that many, one or none at the target."""
    prompt, text = await zoo.window(60, 60)
    here, there = zoo.instances[source], zoo.instances[OTHER[source]]
    refusals: set[str | None] = set()
    left_at_target: set[int] = set()
    for tries in range(200):
        max_tokens = 12
        attempt = await zoo.start(here, prompt, greedy(max_tokens))
        await attempt.until_output(max_tokens - 1 - tries % 5)
        if not attempt.ended:
            refusals.add(await here.cut(attempt.engine_request_id))
        await attempt.until_end()
        if attempt.ticket is not None:
            left_at_target.add(max_tokens - len(attempt.output))
            attempt = await zoo.resume(attempt, there, ticket=attempt.ticket)
        await attempt.until_end()
        assert attempt.output == text[:max_tokens]
        assert attempt.finish_reason is not None
        assert attempt.finish_reason.name == "LENGTH"
        if {None, "ending"} <= refusals and 1 in left_at_target:
            break
    assert {None, "ending"} <= refusals, refusals
    assert refusals <= {None, "ending", "unknown"}
    assert 1 in left_at_target
    assert 0 not in left_at_target


@pytest.mark.parametrize("source", KINDS)
async def test_model_length_races_the_cut(zoo: Zoo, source: str) -> None:
    """A request that reaches the model's maximum length ends there, even if it is cut shortly before."""
    room = 12
    prompt, expected = await zoo.reference(MAX_MODEL_LEN - room, room)
    here, there = zoo.instances[source], zoo.instances[OTHER[source]]
    outcomes: set[str] = set()
    for tries in range(40):
        attempt = await zoo.start(here, prompt, greedy(500))
        await attempt.until_output(room - 1 - tries % 6)
        refused = "unknown" if attempt.ended else await here.cut(attempt.engine_request_id)
        await attempt.until_end()
        if attempt.ticket is not None:
            outcomes.add("moved")
            attempt = await zoo.resume(attempt, there, ticket=attempt.ticket)
        elif refused is not None:
            outcomes.add(refused)
        await attempt.until_end()
        assert attempt.output == expected
        assert attempt.finish_reason is not None
        assert attempt.finish_reason.name == "LENGTH"
        if {"moved", "ending"} <= outcomes:
            break
    assert {"moved", "ending"} <= outcomes, outcomes


@pytest.mark.parametrize("source", KINDS)
async def test_one_token_output(zoo: Zoo, source: str) -> None:
    """A request for one token cannot be cut, and completes."""
    prompt, expected = await zoo.window(70, 1)
    here = zoo.instances[source]
    for _ in range(10):
        attempt = await zoo.start(here, prompt, greedy(1))
        assert await here.cut(attempt.engine_request_id) in {"waiting", "prefilling", "ending", "unknown"}
        await attempt.until_end()
        assert attempt.output == expected
        assert attempt.ticket is None


@pytest.mark.parametrize("target", KINDS)
async def test_preemption_after_a_move(zoo: Zoo, target: str) -> None:
    """
    A request that was moved, then preempted for lack of blocks and recomputed, keeps its output.

    The V1 runner rebuilds its state from the output count that the scheduler passes to it.
    """
    here, there = zoo.instances[OTHER[target]], zoo.instances[target]
    prompt, expected = await zoo.window(20, 280)
    older_prompt, older_expected = await zoo.window(10, 290)
    older = await zoo.start(there, older_prompt, greedy(290))
    attempt = await zoo.start(here, prompt, greedy(280))
    await attempt.until_output(10)
    attempt = await zoo.move(attempt, there)
    await attempt.until_output(5)
    rest = await zoo.squeeze(there, 1)  # the next request that grows preempts the latest arrival
    waited = False

    async def preempted() -> bool:
        nonlocal waited
        waited = attempt.engine_request_id in (await there.report())[0].waiting_ids
        return waited or attempt.ended

    await eventually(preempted, "preempted")
    await there.release_reservation(rest)
    await asyncio.gather(attempt.until_end(), older.until_end())
    assert waited
    assert attempt.output == expected
    assert older.output == older_expected


@pytest.mark.parametrize("target", KINDS)
async def test_undone_cut_after_a_move(zoo: Zoo, target: str) -> None:
    """A request that was moved, then cut again with the cut undone at once, keeps its output."""
    here, there = zoo.instances[OTHER[target]], zoo.instances[target]
    prompt, expected = await zoo.window(40, 150)
    for _ in range(10):
        attempt = await zoo.start(here, prompt, greedy(150))
        await attempt.until_output(10)
        attempt = moved = await zoo.move(attempt, there)
        undone = 0
        while not attempt.ended:
            await attempt.until_output(len(attempt.token_ids) + 3)
            attempt, was_undone = await zoo.cut_and_undo(attempt)
            undone += was_undone
        assert attempt.output == expected
        if moved.instance is there and undone:
            break
    assert moved.instance is there
    assert undone


@pytest.mark.parametrize("target", KINDS)
async def test_no_budget_on_arrival(zoo: Zoo, target: str) -> None:
    """A request whose KV cache arrives while a long prefill takes all of each step's budget runs afterwards."""
    here, there = zoo.instances[OTHER[target]], zoo.instances[target]
    prompt, expected = await zoo.window(40, 60)
    long_prompt, long_expected = await zoo.reference(MAX_MODEL_LEN - 12, 12)
    attempt = await zoo.start(here, prompt, greedy(60))
    await attempt.until_output(10)
    long = await zoo.start(there, long_prompt, greedy(12))
    attempt = await zoo.move(attempt, there)
    await asyncio.gather(attempt.until_end(), long.until_end())
    assert attempt.output == expected
    assert long.output == long_expected


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_min_tokens(zoo: Zoo, source: str, target: str) -> None:
    """`min_tokens` counts from the beginning of the output, not from the move."""
    prompt, text = await zoo.window(40, 60)
    here, there = zoo.instances[source], zoo.instances[target]
    # A stop token before the minimum must not end the output; one just after it must.
    early = next(i for i in range(6, 20) if text[i] not in text[:i])
    late = next(i for i in range(25, 60) if text[i] not in text[:i])
    for at, min_tokens in ((early, 25), (late, late - 1)):
        params = {"stop_token_ids": [text[at]], "min_tokens": min_tokens}
        alone = await zoo.run(here, prompt, greedy(60, **params))
        assert len(alone.output) >= min_tokens
        assert (alone.output == text[: at + 1]) == (at == late)
        for cut_at in (3, 12, 18):
            attempt = await zoo.start(here, prompt, greedy(60, **params))
            await attempt.until_output(cut_at)
            attempt = await (await zoo.move(attempt, there)).until_end()
            assert attempt.output == alone.output
            assert attempt.finish_reason == alone.finish_reason


@pytest.mark.quick_v2
async def test_many_at_once(zoo: Zoo) -> None:
    """Requests of all lengths moving between all kinds of instances at the same time keep their outputs."""
    rng_order = list(itertools.islice(itertools.cycle(PAIRS), 24))

    async def wander(number: int, source: str, target: str) -> None:
        n_prompt = 9 + 7 * number
        prompt, expected = await zoo.window(n_prompt, 60)
        attempt = await zoo.start(zoo.instances[source], prompt, greedy(60))
        here, there = source, target
        for _ in range(3):
            await attempt.until_output(4 + number % 5)
            attempt = await zoo.move(attempt, zoo.instances[there])
            here, there = there, here
        await attempt.until_end()
        assert attempt.output == expected

    await asyncio.gather(*(wander(number, *pair) for number, pair in enumerate(rng_order)))


async def test_unrelated_prompts_are_not_mixed_up(zoo: Zoo) -> None:
    """The reference output depends on its prompt: another prompt of the same length gives another output."""
    prompt, expected = await zoo.window(90, 20)
    other = await zoo.run(zoo.instances["async"], random_prompt(90, 99), greedy(20))
    assert prompt != other.request.prompt_token_ids
    assert other.output != expected
