"""The part of the contract that is about parked requests and chunk budgets; see `engine_contract.py`."""

import asyncio

import pytest
from engine_bed import Bed

from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import Resume

N_PROMPT = 70
N_OUTPUT = 60


async def a_parked_request_stops_with_its_first_token(bed: Bed) -> None:
    """One token, a ticket for the whole prompt, no slot in the batch; the next instance pulls it and goes on."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("k1", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("k1", request, park=True)).until_end()
    assert heard.token_ids == expected[:1]
    assert heard.ticket is not None
    assert heard.ticket.n_tokens == N_PROMPT
    assert not heard.dropped
    report, counters = await bed.a.engine.report()
    assert (report.running_ids, report.waiting_ids, counters.pinned) == ((), (), 1)
    assert report.kv_blocks_used == bed.a.capacity.blocks_for(N_PROMPT)
    before = (await bed.b.engine.report())[1]
    assert await bed.b.engine.reserve("k-room", N_PROMPT + N_OUTPUT) is None
    rest = await (await bed.b.add("k1~1", request, Resume(heard.token_ids, heard.ticket, "k-room"))).until_end()
    assert heard.token_ids + rest.token_ids == expected
    after = (await bed.b.engine.report())[1]
    assert (after.pulls - before.pulls, after.pulled_tokens - before.pulled_tokens) == (1, N_PROMPT)
    await bed.settled()


async def parked_requests_of_all_lengths_go_on(bed: Bed) -> None:
    """Prompts that end at, before and behind the edge of a block, several at once: each has its text."""
    lengths = [n + extra for n in (32, 64) for extra in (-1, 0, 1)] + [1, 300]
    expected = {n: await bed.alone(n, 20) for n in lengths}

    async def one(n: int) -> list[int]:
        request = bed.maker.make_request(f"k2-{n}", n, 20)
        heard = await (await bed.a.add(f"k2-{n}", request, park=True)).until_end()
        assert heard.ticket is not None
        assert heard.ticket.n_tokens == n
        resume = Resume(list(heard.token_ids), heard.ticket)
        return heard.token_ids + (await (await bed.b.add(f"k2-{n}~1", request, resume)).until_end()).token_ids

    assert await asyncio.gather(*(one(n) for n in lengths)) == [expected[n] for n in lengths]
    await bed.settled()


async def one_that_ends_with_its_first_token_is_not_parked(bed: Bed) -> None:
    """A real end pins nothing: at its cap, or at a stop token."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    for name, n_output, stops in (("k3", 1, ()), ("k4", N_OUTPUT, (expected[0],))):
        request = bed.maker.make_request(name, N_PROMPT, n_output, stops)
        heard = await (await bed.a.add(name, request, park=True)).until_end()
        assert heard.token_ids == expected[:1]
        assert heard.ticket is None
        await bed.settled()


async def an_orphan_can_be_parked(bed: Bed) -> None:
    """A request that comes with output is computed anew and stops with its next token."""
    expected = await bed.alone(N_PROMPT, N_OUTPUT)
    request = bed.maker.make_request("k5", N_PROMPT, N_OUTPUT)
    heard = await (await bed.a.add("k5", request, Resume(expected[:5]), park=True)).until_end()
    assert heard.token_ids == expected[5:6]
    assert heard.ticket is not None
    assert heard.ticket.n_tokens == N_PROMPT + 5
    rest = await (await bed.b.add("k5~1", request, Resume(expected[:6], heard.ticket))).until_end()
    assert rest.token_ids == expected[6:]
    await bed.settled()


async def one_that_is_to_be_parked_can_be_aborted(bed: Bed) -> None:
    """At any moment, before its first token and after it; and a cut of one is refused."""
    request = bed.maker.make_request("k6", 400, N_OUTPUT)
    await bed.a.add("k6", request, park=True)
    assert await bed.a.engine.cut("k6") in {"waiting", "prefilling", "already_cut", "unknown"}
    await bed.a.engine.abort(["k6"])
    await bed.a.engine.release_pin("k6")  # of one that was faster
    await bed.settled()
    heard = await (await bed.a.add("k7", request, park=True)).until_end()
    assert heard.ticket is not None
    await bed.a.engine.abort(["k7"])
    assert (await bed.a.engine.report())[1].pinned == 1
    await bed.a.engine.release_pin("k7")
    await bed.settled()


async def a_pin_is_renewed_while_it_lasts(bed: Bed) -> None:
    """An instance says whether it has the blocks still."""
    request = bed.maker.make_request("k8", N_PROMPT, N_OUTPUT)
    assert not await bed.a.engine.renew_pin("k8")
    heard = await (await bed.a.add("k8", request, park=True)).until_end()
    assert heard.ticket is not None
    for _ in range(3):
        assert await bed.a.engine.renew_pin("k8")
    await bed.a.engine.release_pin("k8")
    await bed.settled()
    assert not await bed.a.engine.renew_pin("k8")


async def a_chunk_budget_is_kept(bed: Bed) -> None:
    """A prompt is computed in as many steps as the budget makes, with the same text; None brings back the old one."""
    engine, capacity = bed.a.engine, bed.a.capacity
    expected = await bed.alone(300, 5)
    budget = capacity.max_num_seqs + 16
    assert await engine.set_step_budget(budget) == budget
    report, before = await engine.report()
    assert before.step_budget == budget
    assert await bed.alone(300, 5) == expected
    report, after = await engine.report()
    assert after.steps - before.steps >= 300 // budget
    assert all(step.batch.prefill_tokens <= budget for step in report.steps)
    assert await engine.set_step_budget(None) == capacity.max_batched_tokens
    assert (await engine.report())[1].step_budget == capacity.max_batched_tokens
    await bed.settled()


async def an_impossible_chunk_budget_is_refused(bed: Bed) -> None:
    """Too little for the requests that may run, or more than the instance was started with: nothing has changed."""
    engine, capacity = bed.a.engine, bed.a.capacity
    for budget, said in (
        (capacity.max_num_seqs - 1, "below"),
        (capacity.max_batched_tokens + 1, "above"),
        (0, "below"),
    ):
        with pytest.raises(EngineError, match=f"{budget} is {said}"):
            await engine.set_step_budget(budget)
    assert (await engine.report())[1].step_budget == capacity.max_batched_tokens


PARKING = (
    a_parked_request_stops_with_its_first_token,
    parked_requests_of_all_lengths_go_on,
    one_that_ends_with_its_first_token_is_not_parked,
    an_orphan_can_be_parked,
    one_that_is_to_be_parked_can_be_aborted,
    a_pin_is_renewed_while_it_lasts,
    a_chunk_budget_is_kept,
    an_impossible_chunk_budget_is_refused,
)
