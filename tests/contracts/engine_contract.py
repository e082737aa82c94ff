"""
The contract of `engines/protocol.py` as tests. Each function takes a `Bed` and asserts one rule that the runtime relies
on.

Tests in `SHARED` can use the same two engines in turn and leave nothing behind; those in `OWN` break their engines and
get fresh ones.
"""

import asyncio

import pytest
from engine_bed import Bed, eventually

from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import Resume

N_PROMPT = 70
N_OUTPUT = 150
"""Far more tokens than the tests wait for before they move or cut a request: an engine does not wait for them."""


async def runs_to_the_end(bed: Bed) -> None:
    """A request yields exactly its tokens, reports its end once, carries no ticket, and leaves nothing behind."""
    first = await bed.alone(N_PROMPT, N_OUTPUT)
    assert first == await bed.alone(N_PROMPT, N_OUTPUT)
    await bed.settled()


async def cut_takes_effect_at_the_next_token(bed: Bed) -> None:
    """A cut ends the request within two tokens, with a final output that carries a ticket; its blocks are pinned."""
    request = bed.maker.make_request("c1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("c1", request)).until_tokens(3)
    (before, _), ticket = await asyncio.gather(bed.a.engine.report(), bed.cut("c1", heard))
    n_tokens = N_PROMPT + len(heard.token_ids)
    assert 0 <= n_tokens - before.running_tokens[0] <= 2 + 1, "a step may lie between report and cut"
    assert ticket.n_tokens == n_tokens - 1
    assert not heard.dropped
    report, counters = await bed.a.engine.report()
    assert counters.pinned == 1
    assert {reason: n for reason, n in counters.held_blocks.items() if n} == {"pins": report.kv_blocks_used}
    assert report.running_ids == ()
    assert report.kv_blocks_used == bed.a.capacity.blocks_for(n_tokens - 1)
    await bed.a.engine.release_pin("c1")
    await bed.settled()


async def resume_pulls(bed: Bed) -> None:
    """A request resumed with its ticket continues as if unmoved, pulls exactly N - 1 tokens, and frees the source."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("p1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("p1", request)).until_tokens(5)
    before = (await bed.b.engine.report())[1]
    assert await bed.b.engine.reserve("room", N_PROMPT + N_OUTPUT) is None
    ticket = await bed.cut("p1", heard)
    rest = await bed.b.add("p1~1", request, Resume(list(heard.token_ids), ticket, "room"))
    await rest.until_end()
    assert heard.token_ids + rest.token_ids == expected
    assert rest.ticket is None
    after = (await bed.b.engine.report())[1]
    assert after.pulls - before.pulls == 1
    assert after.pulled_tokens - before.pulled_tokens == N_PROMPT + len(heard.token_ids) - 1
    assert after.failed_pulls == before.failed_pulls
    await bed.settled()


async def resume_recomputes(bed: Bed) -> None:
    """A request resumed without a ticket continues as if it had never moved."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("r1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("r1", request)).until_tokens(5)
    await bed.cut("r1", heard)
    await bed.a.engine.release_pin("r1")
    before = (await bed.b.engine.report())[1]
    rest = await (await bed.b.add("r1~1", request, Resume(list(heard.token_ids)))).until_end()
    assert heard.token_ids + rest.token_ids == expected
    assert (await bed.b.engine.report())[1].pulls == before.pulls
    await bed.settled()


async def a_moved_request_moves_on(bed: Bed) -> None:
    """A resumed request can be cut again and resumed where it came from."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("m1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("m1", request)).until_tokens(3)
    output = list(heard.token_ids)
    here, there = bed.a, bed.b
    for move in range(1, 5):
        attempt = "m1" if move == 1 else f"m1~{move - 1}"
        assert await here.engine.cut(attempt) is None
        await here.by_attempt[attempt].until_end()
        before = [] if move == 1 else output
        output = before + here.by_attempt[attempt].token_ids
        here, there = there, here
        moved = await here.add(f"m1~{move}", request, Resume(list(output), there.by_attempt[attempt].ticket))
        await moved.until_tokens(3)
    assert output + (await moved.until_end()).token_ids == expected
    await bed.settled()


async def cut_is_refused(bed: Bed) -> None:
    """A cut is refused with the reason for an unknown request, for one already cut, and for one about to end."""
    assert await bed.a.engine.cut("nobody") == "unknown"
    request = bed.maker.make_request("f1", N_PROMPT, 2)
    heard = await bed.a.add("f1", request)
    refused = await bed.a.engine.cut("f1")
    assert refused in {"waiting", "prefilling", "ending", "unknown"}
    await heard.until_end()
    assert heard.ticket is None
    request = bed.maker.make_request("f2", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("f2", request)).until_tokens(2)
    first, second = await asyncio.gather(bed.a.engine.cut("f2"), bed.a.engine.cut("f2"))
    assert first is None
    assert second in {"already_cut", "unknown"}
    await heard.until_end()
    assert heard.ticket is not None
    assert await bed.a.engine.cut("f2") == "unknown"
    await bed.a.engine.release_pin("f2")
    await bed.settled()


async def undo_either_lets_go_on_or_comes_too_late(bed: Bed) -> None:
    """An undone cut leaves no trace; False means that the final output with the ticket is on its way or has arrived."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("u1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("u1", request)).until_tokens(2)
    refused, undone = await asyncio.gather(bed.a.engine.cut("u1"), bed.a.engine.undo_cut("u1"))
    assert refused is None
    await heard.until_end()
    if undone:
        assert heard.ticket is None
        assert heard.token_ids == expected
    else:
        assert heard.ticket is not None
        await bed.a.engine.release_pin("u1")
    assert not await bed.a.engine.undo_cut("u1")
    await bed.settled()


async def a_real_end_beats_the_cut(bed: Bed) -> None:
    """A request that ends by itself on the token of its cut has ended normally: no ticket, nothing pinned."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    at = next(i for i in range(8, N_OUTPUT) if expected[i] not in expected[:i])
    for start in range(at - 4, at):
        attempt = f"e{start}"
        request = bed.maker.make_request(attempt, N_PROMPT, N_OUTPUT, (expected[at],))
        heard = await (await bed.a.add(attempt, request)).until_tokens(start)
        await bed.a.engine.cut(attempt)
        await heard.until_end()
        assert heard.token_ids == expected[: len(heard.token_ids)]
        if len(heard.token_ids) == at + 1:
            assert heard.ticket is None
        else:
            await bed.a.engine.release_pin(attempt)
        await bed.settled()


async def reservations_hold_room(bed: Bed) -> None:
    """A reservation holds blocks until it is released, once even if asked for twice; what does not fit is refused."""
    engine, capacity = bed.a.engine, bed.a.capacity
    assert await engine.reserve("one", N_PROMPT) is None
    held = (await engine.report())[0].kv_blocks_used
    assert held >= capacity.blocks_for(N_PROMPT)
    assert await engine.reserve("one", N_PROMPT) is None
    assert (await engine.report())[0].kv_blocks_used == held
    assert (await engine.report())[1].reserved == 1
    assert await engine.reserve("all", capacity.kv_tokens) == "no_blocks"
    await engine.release_reservation("one")
    await engine.release_reservation("one")
    await bed.settled()


async def reservations_hold_slots(bed: Bed) -> None:
    """There are never more reservations than slots in the batch."""
    engine, n = bed.b.engine, bed.b.capacity.max_num_seqs
    ids = [f"slot{i}" for i in range(n + 1)]
    answers = [await engine.reserve(reservation_id, 1) for reservation_id in ids]
    assert answers == [None] * n + ["no_slot"]
    for reservation_id in ids:
        await engine.release_reservation(reservation_id)
    await bed.settled()


async def abort_frees(bed: Bed) -> None:
    """Once the instance has answered a later command, an aborted request sends nothing more and holds nothing."""
    request = bed.maker.make_request("x1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("x1", request)).until_tokens(2)
    await bed.a.engine.abort(["x1", "nobody"])
    await bed.settled()
    n_tokens = len(heard.token_ids)
    assert await bed.alone(N_PROMPT, N_OUTPUT)
    assert len(heard.token_ids) == n_tokens
    assert n_tokens < N_OUTPUT


async def abort_after_the_cut_leaves_the_pin(bed: Bed) -> None:
    """Aborting a request whose cut has taken effect does not free its blocks; releasing the pin does."""
    request = bed.maker.make_request("x2", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("x2", request)).until_tokens(2)
    await bed.cut("x2", heard)
    await bed.a.engine.abort(["x2"])
    await bed.a.engine.release_pin("x2")
    await bed.a.engine.release_pin("x2")
    await bed.settled()


async def the_lease_ends(bed: Bed) -> None:
    """Blocks that nobody pulls or releases are freed when the lease ends."""
    request = bed.maker.make_request("l1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("l1", request)).until_tokens(2)
    await bed.cut("l1", heard)
    await asyncio.sleep(bed.maker.lease_s / 2)
    assert (await bed.a.engine.report())[1].pinned == 1
    await asyncio.sleep(bed.maker.lease_s)
    await bed.settled()


async def a_resume_whose_time_is_over_computes_anew(bed: Bed) -> None:
    """A ticket whose deadline has passed is not pulled: same tokens, no pull, and the pin is released."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("o1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("o1", request)).until_tokens(5)
    ticket = await bed.cut("o1", heard)
    before = (await bed.b.engine.report())[1]
    over_s = bed.maker.now_s() - 0.001
    rest = await (await bed.b.add("o1~1", request, Resume(list(heard.token_ids), ticket, None, over_s))).until_end()
    assert heard.token_ids + rest.token_ids == expected
    after = (await bed.b.engine.report())[1]
    assert (after.pulls, after.failed_pulls) == (before.pulls, before.failed_pulls)
    await bed.settled()


async def a_resume_in_time_pulls(bed: Bed) -> None:
    """A ticket with time left is pulled, although the instance's clock is known only from its answers."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("o2", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("o2", request)).until_tokens(5)
    ticket = await bed.cut("o2", heard)
    before = (await bed.b.engine.report())[1]
    soon_s = bed.maker.now_s() + bed.maker.lease_s
    rest = await (await bed.b.add("o2~1", request, Resume(list(heard.token_ids), ticket, None, soon_s))).until_end()
    assert heard.token_ids + rest.token_ids == expected
    after = (await bed.b.engine.report())[1]
    assert (after.pulls, after.failed_pulls) == (before.pulls + 1, before.failed_pulls)
    await bed.settled()


async def the_report_names_requests(bed: Bed) -> None:
    """The report lists each live request once, by attempt, with its length; the batch never exceeds its slots."""
    n = bed.a.capacity.max_num_seqs + 2
    requests = [bed.maker.make_request(f"q{i}", 20 + i, 200) for i in range(n)]
    for request in requests:
        await bed.a.add(request.request_id, request)
    await bed.a.by_attempt["q0"].until_tokens(2)
    report, counters = await bed.a.engine.report()
    await bed.a.engine.abort([r.request_id for r in requests])
    lengths = dict(
        zip(report.running_ids + report.waiting_ids, report.running_tokens + report.waiting_tokens, strict=True)
    )
    assert sorted(lengths) == sorted(r.request_id for r in requests)
    assert len(report.running_ids) <= bed.a.capacity.max_num_seqs
    assert counters.steps > 0
    assert counters.scheduled_tokens > 0
    assert report.kv_blocks_used > 0
    await bed.settled()
    for index in range(n):
        n_sent = len(bed.a.by_attempt[f"q{index}"].token_ids)
        assert 20 + index <= lengths[f"q{index}"] <= 20 + index + n_sent, "what is counted is sent"


async def the_load_comes_along(bed: Bed) -> None:
    """With outputs, once asked for, at most once per interval; it is the load after their step, and none is kept."""
    request = bed.maker.make_request("l1", N_PROMPT, N_OUTPUT)
    await bed.a.engine.report(0.0)
    bed.a.loads.clear()
    heard = await (await bed.a.add("l1", request)).until_tokens(20)
    n_loads = len(bed.a.loads)
    assert n_loads >= 10, "with every step"
    await bed.a.engine.report(600.0)
    for report, _, sent in bed.a.loads[:n_loads]:
        assert report.running_ids == ("l1",)
        assert report.running_tokens == (N_PROMPT + sent["l1"],), "what is counted has been sent"
    steps = [counters.steps for _, counters, _ in bed.a.loads[:n_loads]]
    assert steps == sorted(set(steps))
    n_samples = sum(len(report.steps) for report, _, _ in bed.a.loads[:n_loads])
    assert n_samples <= steps[-1], "no step is told of twice"
    n_loads, n_tokens = len(bed.a.loads), len(heard.token_ids)
    await heard.until_tokens(n_tokens + 20)
    assert len(bed.a.loads) == n_loads
    await bed.a.engine.abort(["l1"])
    await bed.settled()


async def says_what_it_is(bed: Bed) -> None:
    """A started engine reports whether its requests can move, what runs in it, and its number in metrics."""
    first, second = bed.a.engine, bed.b.engine
    assert first.movable
    assert second.movable
    assert first.index >= 0
    told = await first.identity()
    assert told.engine == (await second.identity()).engine, "two instances of one model are the same engine"
    assert told.engine.layers > 0
    assert told.kv_bytes_per_token > 0


async def who_is_gone_leaves_nothing(bed: Bed) -> None:
    """
    A departed front end's requests are aborted and its reservations
    released; those of other clients are untouched.
    """
    request = bed.maker.make_request("g1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("g1", request)).until_tokens(2)
    assert await bed.a.engine.reserve("g-room", N_PROMPT) is None
    assert await bed.a.engine.forget_client(7) == 0
    assert (await bed.a.engine.report())[1].reserved == 1
    assert await bed.a.engine.forget_client(0) == 1
    await bed.settled()
    assert len(heard.token_ids) < N_OUTPUT
    assert await bed.alone(N_PROMPT, N_OUTPUT), "the next request of the same client is served"


async def knows_no_other_methods(bed: Bed) -> None:
    """Calling a method that the engine does not have raises an EngineError."""
    with pytest.raises(EngineError, match="has no fly_async"):
        await bed.a.engine.utility("fly_async", 3)


async def says_nothing_before_its_start(bed: Bed) -> None:
    """
    What is known only after a start raises an EngineError before it;
    stopping an engine that never started is harmless.
    """
    engine = bed.maker.make_engine("0")
    with pytest.raises(EngineError):
        _ = engine.movable
    assert engine.pid is None
    await engine.stop(0.0)


async def death_is_told_once_everywhere(bed: Bed) -> None:
    """
    After a kill, `next_outputs` raises (and `died` says so), pending commands get an error, sending does nothing, and
    stopping does no harm.
    """
    request = bed.maker.make_request("d1", N_PROMPT, 200)
    await (await bed.a.add("d1", request)).until_tokens(2)
    bed.a.engine.kill()
    pending = asyncio.gather(bed.a.engine.reserve("r", 10), bed.a.engine.report(), return_exceptions=True)
    await asyncio.wait_for(bed.a.died.wait(), 30.0)
    assert [type(answer) for answer in await pending] == [EngineError, EngineError]
    with pytest.raises(EngineError):
        await bed.a.engine.cut("d1")
    await bed.a.engine.add("d2", bed.maker.make_request("d2", N_PROMPT, 5))
    await bed.a.engine.abort(["d1"])
    await bed.a.engine.stop(1.0)
    await bed.a.engine.stop(1.0)
    assert bed.a.engine.pid is None
    assert await bed.b.holds_nothing()


async def reaches_the_living(bed: Bed) -> None:
    """
    A peer is reached while it lives, several at once and again and again; a dead one is not, and asking for it does not
    keep an instance from its steps.
    """
    both = await asyncio.gather(bed.a.engine.reaches(bed.b.engine), bed.b.engine.reaches(bed.a.engine))
    assert both == [True, True]
    assert await bed.b.engine.reaches(bed.a.engine)
    bed.a.engine.kill()
    await asyncio.wait_for(bed.a.died.wait(), 30.0)
    asking = asyncio.ensure_future(bed.b.engine.reaches(bed.a.engine))
    request = bed.maker.make_request("s1", N_PROMPT, N_OUTPUT)
    await (await bed.b.add("s1", request)).until_end()
    assert not await asyncio.wait_for(asking, 60.0)


async def a_pull_from_the_dead_recomputes(bed: Bed) -> None:
    """When the source dies while its ticket is out, the target recomputes: same tokens, one failed pull."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("k1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("k1", request)).until_tokens(5)
    ticket = await bed.cut("k1", heard)
    bed.a.engine.kill()
    await asyncio.wait_for(bed.a.died.wait(), 30.0)
    rest = await (await bed.b.add("k1~1", request, Resume(list(heard.token_ids), ticket))).until_end()
    assert heard.token_ids + rest.token_ids == expected
    assert (await bed.b.engine.report())[1].failed_pulls == 1
    await eventually(bed.b.holds_nothing, "b holds nothing")


async def stop_ends_pending_calls(bed: Bed) -> None:
    """Commands pending while the engine is stopped get an error instead of waiting for ever."""
    bed.a._pump.cancel()  # as in the runtime, where nobody listens any more when a hung instance is stopped
    bed.a.engine.kill()
    pending = asyncio.ensure_future(bed.a.engine.reserve("r", 10))
    await asyncio.sleep(0)
    await bed.a.engine.stop(1.0)
    with pytest.raises(EngineError):
        await asyncio.wait_for(pending, 30.0)


SHARED = (
    runs_to_the_end,
    cut_takes_effect_at_the_next_token,
    resume_pulls,
    resume_recomputes,
    a_moved_request_moves_on,
    cut_is_refused,
    undo_either_lets_go_on_or_comes_too_late,
    a_real_end_beats_the_cut,
    reservations_hold_room,
    reservations_hold_slots,
    abort_frees,
    abort_after_the_cut_leaves_the_pin,
    the_lease_ends,
    a_resume_whose_time_is_over_computes_anew,
    a_resume_in_time_pulls,
    the_report_names_requests,
    the_load_comes_along,
    says_what_it_is,
    who_is_gone_leaves_nothing,
    knows_no_other_methods,
    says_nothing_before_its_start,
)
OWN = (death_is_told_once_everywhere, reaches_the_living, a_pull_from_the_dead_recomputes, stop_ends_pending_calls)
