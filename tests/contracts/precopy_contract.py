"""The part of the contract that is about full blocks that go ahead of their request; see `engine_contract.py`."""

import asyncio

from engine_bed import Bed, eventually

from cascadeinfer.engines.protocol import KvTicket, Resume

N_PROMPT = 70
N_OUTPUT = 150


async def copied_ahead(bed: Bed, attempt: str, room: str, within_s: float = 30.0) -> KvTicket:
    """Copy the full blocks of a request that runs at `a` into room reserved at `b`; returns where they were."""
    assert await bed.b.engine.reserve(room, N_PROMPT + N_OUTPUT) is None
    full = await bed.a.engine.pin_full_blocks(attempt)
    assert full is not None
    assert await bed.b.engine.precopy(room, full, bed.maker.now_s() + within_s) == (within_s > 0.0)
    return full


async def full_blocks_go_ahead(bed: Bed) -> None:
    """
    A request whose full blocks were copied while it decoded continues as if unmoved; after the cut only the rest is
    pulled, and nothing is left.
    """
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("h1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("h1", request)).until_tokens(5)
    before = (await bed.b.engine.report())[1]
    full = await copied_ahead(bed, "h1", "h1-room")
    assert full.n_tokens % bed.a.capacity.block_size_tokens == 0
    assert 0 < full.n_tokens < N_PROMPT + len(heard.token_ids)
    await bed.a.engine.release_full_blocks("h1")
    await bed.a.engine.release_full_blocks("h1")
    n_tokens = len(heard.token_ids)
    await heard.until_tokens(n_tokens + 2)
    ticket = await bed.cut("h1", heard)
    rest = await bed.b.add("h1~1", request, Resume(list(heard.token_ids), ticket, "h1-room"))
    await rest.until_end()
    assert heard.token_ids + rest.token_ids == expected
    after = (await bed.b.engine.report())[1]
    assert after.precopied_tokens - before.precopied_tokens == full.n_tokens
    left = N_PROMPT + len(heard.token_ids) - 1 - full.n_tokens
    cached = left % bed.a.capacity.block_size_tokens  # where an earlier request has left the same text
    assert after.pulled_tokens - before.pulled_tokens in {left, cached}
    assert after.failed_pulls == before.failed_pulls
    await bed.settled()


async def full_blocks_outlive_their_request(bed: Bed) -> None:
    """Pinned full blocks can be copied although their request has been aborted; releasing them frees both ends."""
    request = bed.maker.make_request("h2", N_PROMPT, N_OUTPUT)
    await (await bed.a.add("h2", request)).until_tokens(5)
    full = await bed.a.engine.pin_full_blocks("h2")
    assert full is not None
    await bed.a.engine.abort(["h2"])
    held = (await bed.a.engine.report())[1].held_blocks
    assert {reason: n for reason, n in held.items() if n} == {"precopies": bed.a.capacity.blocks_for(full.n_tokens)}
    assert await bed.a.engine.pin_full_blocks("h2") is None
    assert await bed.b.engine.reserve("h2-room", N_PROMPT + N_OUTPUT) is None
    assert await bed.b.engine.precopy("h2-room", full, bed.maker.now_s() + 30.0)
    await bed.b.engine.release_reservation("h2-room")
    await bed.a.engine.release_full_blocks("h2")
    await bed.settled()


async def the_lease_on_full_blocks_ends(bed: Bed) -> None:
    """Full blocks that nobody releases are given back when their lease ends."""
    request = bed.maker.make_request("h3", N_PROMPT, N_OUTPUT)
    await (await bed.a.add("h3", request)).until_tokens(5)
    assert await bed.a.engine.pin_full_blocks("h3") is not None
    await bed.a.engine.abort(["h3"])
    await asyncio.sleep(bed.maker.lease_s / 2)
    assert not await bed.a.holds_nothing()
    await asyncio.sleep(bed.maker.lease_s)
    await bed.settled()


async def a_late_copy_is_not_used(bed: Bed) -> None:
    """A copy whose deadline has passed says so, and all is pulled after the cut."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("h4", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("h4", request)).until_tokens(5)
    before = (await bed.b.engine.report())[1]
    await copied_ahead(bed, "h4", "h4-room", within_s=-1.0)
    await bed.a.engine.release_full_blocks("h4")
    ticket = await bed.cut("h4", heard)
    rest = await bed.b.add("h4~1", request, Resume(list(heard.token_ids), ticket, "h4-room"))
    await rest.until_end()
    assert heard.token_ids + rest.token_ids == expected
    after = (await bed.b.engine.report())[1]
    assert (after.precopied_tokens, after.failed_pulls) == (before.precopied_tokens, before.failed_pulls)
    await bed.settled()


async def a_copy_of_another_request_does_no_harm(bed: Bed) -> None:
    """A request that comes with the reservation of another has its own text."""
    other_expected = await bed.alone(N_PROMPT + 5, N_OUTPUT)
    request = bed.maker.make_request("h5", N_PROMPT, N_OUTPUT)
    other = bed.maker.make_request("h6", N_PROMPT + 5, N_OUTPUT)
    await (await bed.a.add("h5", request)).until_tokens(5)
    before = (await bed.b.engine.report())[1]
    full = await copied_ahead(bed, "h5", "h5-room")
    await bed.a.engine.release_full_blocks("h5")
    await bed.a.engine.abort(["h5"])
    heard = await (await bed.a.add("h6", other)).until_tokens(5)
    ticket = await bed.cut("h6", heard)
    rest = await bed.b.add("h6~1", other, Resume(list(heard.token_ids), ticket, "h5-room"))
    await rest.until_end()
    assert heard.token_ids + rest.token_ids == other_expected
    n_used = (await bed.b.engine.report())[1].precopied_tokens - before.precopied_tokens
    assert n_used in {0, full.n_tokens}, "all, if both requests have the same blocks, or nothing"
    await bed.settled()


async def there_is_nothing_to_go_ahead(bed: Bed) -> None:
    """An unknown request has no full blocks, and without room nothing is copied."""
    assert await bed.a.engine.pin_full_blocks("nobody") is None
    request = bed.maker.make_request("h7", N_PROMPT, N_OUTPUT)
    await (await bed.a.add("h7", request)).until_tokens(5)
    full = await bed.a.engine.pin_full_blocks("h7")
    assert full is not None
    assert not await bed.b.engine.precopy("no room", full, bed.maker.now_s() + 30.0)
    await bed.a.engine.abort(["h7"])
    await bed.a.engine.release_full_blocks("h7")
    await bed.settled()


async def a_copy_from_the_dead_fails(bed: Bed) -> None:
    """When the source dies before the target has read its full blocks, the copy fails and frees the room."""
    request = bed.maker.make_request("k2", N_PROMPT, N_OUTPUT)
    await (await bed.a.add("k2", request)).until_tokens(5)
    full = await bed.a.engine.pin_full_blocks("k2")
    assert full is not None
    assert await bed.b.engine.reserve("k2-room", N_PROMPT + N_OUTPUT) is None
    bed.a.engine.kill()
    await asyncio.wait_for(bed.a.died.wait(), 30.0)
    assert not await bed.b.engine.precopy("k2-room", full, bed.maker.now_s() + 30.0)
    await bed.b.engine.release_reservation("k2-room")
    await eventually(bed.b.holds_nothing, "b holds nothing")


PRECOPY = (
    full_blocks_go_ahead,
    full_blocks_outlive_their_request,
    the_lease_on_full_blocks_ends,
    a_late_copy_is_not_used,
    a_copy_of_another_request_does_no_harm,
    there_is_nothing_to_go_ahead,
)
"""Between engines that have a prefix cache."""
PRECOPY_OWN = (a_copy_from_the_dead_fails,)
