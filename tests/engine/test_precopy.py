"""
Full blocks go ahead of a request that decodes; its pause carries the rest, and its greedy output is unchanged.

Each kind of instance (scheduling, prefix caching) is source and target; see `zoo.py`. A target without a prefix cache
copies nothing ahead, and its moves pull everything.
"""

import asyncio
import random
import time

import pytest
from zoo import BLOCK, KINDS, OTHER, PAIRS, WINDOW_PROMPT, Attempt, Zoo, eventually, greedy

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LONG_S = 30.0
"""A deadline that no pre-copy of these tests comes near."""


async def copy_ahead(zoo: Zoo, attempt: Attempt, target: str, room: str, within_s: float = LONG_S) -> bool:
    """Reserve room at the target and copy the full blocks of a running request into it."""
    there = zoo.instances[target]
    assert await there.reserve(room, attempt.n_tokens + 64) is None
    ticket = await attempt.instance.pin_full_blocks(attempt.engine_request_id)
    if ticket is None:
        return False
    copied = await there.precopy(room, ticket, time.monotonic() + within_s)
    await attempt.instance.release_full_blocks(attempt.engine_request_id)
    return copied


async def resume_in(zoo: Zoo, attempt: Attempt, target: str, room: str) -> Attempt:
    """Cut the request and continue it in the room; the old attempt if it ended by itself."""
    if not await zoo.cut(attempt):
        await zoo.instances[target].release_reservation(room)
        return attempt
    return await zoo.resume(attempt, zoo.instances[target], ticket=attempt.ticket, reservation_id=room)


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_the_pause_carries_the_rest(zoo: Zoo, source: str, target: str) -> None:
    """The target pulls what is not in the blocks that were copied ahead, and continues with the same text."""
    prompt, expected = await zoo.window(150, 140)
    before = await zoo.counters(zoo.instances[target])
    attempt = await zoo.start(zoo.instances[source], prompt, greedy(140), hold_at=170)
    await attempt.until_output(5)
    copied = await copy_ahead(zoo, attempt, target, "room")
    assert copied == KINDS[target].caches
    moved = await (await resume_in(zoo, attempt, target, "room")).until_end()
    assert moved is not attempt
    assert moved.output == expected
    after = await zoo.counters(zoo.instances[target])
    assert after.failed_pulls == before.failed_pulls
    n_ahead = after.precopied_tokens - before.precopied_tokens
    assert (n_ahead > 0) == copied
    assert n_ahead % BLOCK == 0
    rest = attempt.n_tokens - 1 - n_ahead
    # One of the instances has the text's blocks in its prefix cache.
    assert after.pulled_tokens - before.pulled_tokens in {rest, rest % BLOCK}


async def held(zoo: Zoo, name: str) -> dict[str, int]:
    """Blocks that an instance holds without a request, by reason."""
    return dict((await zoo.counters(zoo.instances[name])).held_blocks)


TRIES = 6
"""Rounds in which requests are copied and cut on their way, before one in which they wait."""
CACHING = [name for name, kind in KINDS.items() if kind.caches]


@pytest.mark.parametrize("target", CACHING)
async def test_every_offset_around_block_boundaries(zoo: Zoo, target: str) -> None:
    """Wherever the copy ends and wherever the cut is, in the same block or in the next, the text is unchanged."""
    lengths = {k * BLOCK + offset for k in (2, 4) for offset in (-2, -1, 0, 1, 2)}

    async def move_near(length: int, number: int) -> int:
        """Cut at the length, or earlier if the request is still on its way there; returns the length at the cut."""
        lead = rng.randrange(4, min(24, length - WINDOW_PROMPT))
        prompt, expected = await zoo.window(length - lead, lead + 24)
        attempt = await zoo.start(zoo.instances[OTHER[target]], prompt, greedy(lead + 24), hold_at=length - 1)
        await attempt.until_output(rng.randrange(1, lead) if number < TRIES else lead - 1)
        copied = await copy_ahead(zoo, attempt, target, f"edge{length}-{number}")
        moved = await resume_in(zoo, attempt, target, f"edge{length}-{number}")
        await moved.until_end()
        assert moved.output == expected
        assert moved is not attempt
        return attempt.n_tokens if copied else 0  # a short one may have no full block yet

    rng = random.Random(1)
    for number in range(TRIES + 1):
        found = set(await asyncio.gather(*(move_near(length, number) for length in sorted(lengths))))
    assert found == lengths


@pytest.mark.parametrize("how", ["end", "abort"])
@pytest.mark.parametrize("target", CACHING)
async def test_the_request_goes_meanwhile(zoo: Zoo, target: str, how: str) -> None:
    """Full blocks stay readable when their request ends or is aborted; afterwards nothing is left at either end."""
    source = zoo.instances[OTHER[target]]
    prompt, expected = await zoo.window(150, 100)
    attempt = await zoo.start(source, prompt, greedy(100), hold_at=165)
    await attempt.until_output(5)
    ticket = await source.pin_full_blocks(attempt.engine_request_id)
    assert ticket is not None
    n_blocks = ticket.n_tokens // BLOCK
    if how == "abort":
        await source.abort([attempt.engine_request_id])
    else:
        await zoo.let_go(attempt)
        assert (await attempt.until_end()).output == expected
    await eventually(lambda: has_only(zoo, OTHER[target], {"precopies": n_blocks}), "pinned for the peer alone")
    assert await source.pin_full_blocks(attempt.engine_request_id) is None
    there = zoo.instances[target]
    assert await there.reserve("gone", 300) is None
    assert await there.precopy("gone", ticket, time.monotonic() + LONG_S)
    await there.release_reservation("gone")
    await source.release_full_blocks(attempt.engine_request_id)


async def has_only(zoo: Zoo, name: str, expected: dict[str, int]) -> bool:
    """Whether an instance holds these blocks without a request, and no others."""
    return {reason: n for reason, n in (await held(zoo, name)).items() if n} == expected


async def test_the_lease_on_full_blocks_ends(zoo: Zoo) -> None:
    """Full blocks that nobody releases are given back when their lease ends, in an idle instance too."""
    source = zoo.instances["sync+cache"]
    prompt, _ = await zoo.window(150, 100)
    attempt = await zoo.start(source, prompt, greedy(100), hold_at=165)
    await attempt.until_output(5)
    assert await source.pin_full_blocks(attempt.engine_request_id) is not None
    await zoo.let_go(attempt)
    await attempt.until_end()
    # Whoever uses the zoo next finds it settled: `zoo` waits for that.


@pytest.mark.parametrize("target", CACHING)
async def test_preempted_meanwhile(zoo: Zoo, target: str) -> None:
    """A request that is preempted at the source after its copy, and computed anew there, moves with the same text."""
    name = OTHER[target]
    here = zoo.instances[name]
    older_prompt, older_expected = await zoo.window(10, 290)
    prompt, expected = await zoo.window(100, 200)
    older = await zoo.start(here, older_prompt, greedy(290), hold_at=20)
    attempt = await zoo.start(here, prompt, greedy(200), hold_at=110)
    await asyncio.gather(older.until_output(10), attempt.until_output(10))
    assert await copy_ahead(zoo, attempt, target, "preempted")
    rest = await zoo.squeeze(here, 1)
    await zoo.let_go(older)
    waited = False

    async def preempted() -> bool:
        nonlocal waited
        waited = attempt.engine_request_id in (await here.report())[0].waiting_ids
        return waited or attempt.ended

    await eventually(preempted, "preempted")
    await here.release_reservation(rest)
    assert waited
    await zoo.let_go(attempt)
    n_tokens = len(attempt.token_ids)
    await attempt.until_output(n_tokens + 3)
    moved = await resume_in(zoo, attempt, target, "preempted")
    await asyncio.gather(moved.until_end(), older.until_end())
    assert moved.output == expected
    assert older.output == older_expected


@pytest.mark.parametrize("target", CACHING)
async def test_another_requests_copy_is_not_used(zoo: Zoo, target: str) -> None:
    """What was copied ahead of one request never serves another, even if it comes with its reservation."""
    source, there = zoo.instances[OTHER[target]], zoo.instances[target]
    prompt, expected = await zoo.window(100, 150)
    other_prompt, other_expected = await zoo.reference(110, 60)
    attempt = await zoo.start(source, prompt, greedy(150), hold_at=110)
    other = await zoo.start(source, other_prompt, greedy(60), hold_at=120)
    await asyncio.gather(attempt.until_output(3), other.until_output(3))
    assert await copy_ahead(zoo, attempt, target, "mixed up")
    before = await zoo.counters(there)
    moved = await (await resume_in(zoo, other, target, "mixed up")).until_end()
    assert moved is not other
    assert moved.output == other_expected
    assert (await zoo.counters(there)).precopied_tokens == before.precopied_tokens
    await zoo.let_go(attempt)
    assert (await attempt.until_end()).output == expected


@pytest.mark.parametrize("target", CACHING)
async def test_too_late(zoo: Zoo, target: str) -> None:
    """A copy whose deadline has passed is not used: everything is pulled."""
    prompt, expected = await zoo.window(100, 200)
    attempt = await zoo.start(zoo.instances[OTHER[target]], prompt, greedy(200), hold_at=120)
    await attempt.until_output(3)
    before = await zoo.counters(zoo.instances[target])
    assert not await copy_ahead(zoo, attempt, target, "late", within_s=-1.0)
    moved = await (await resume_in(zoo, attempt, target, "late")).until_end()
    assert moved is not attempt
    assert moved.output == expected
    after = await zoo.counters(zoo.instances[target])
    assert after.precopied_tokens == before.precopied_tokens
    assert after.failed_pulls == before.failed_pulls
