"""The engine contract on simulated engines, and what is true of these alone."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from engine_bed import Bed
from engine_contract import OWN, SHARED
from parking_contract import PARKING
from precopy_contract import PRECOPY, PRECOPY_OWN

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import EngineRequest, Resume
from cascadeinfer.engines.simulated import SimulatedEngine, SimulatedParams, SimulatedTimes, generate
from support.virtual_time import virtual_time

CAPACITY = InstanceCapacity(kv_blocks=64, block_size_tokens=16, max_num_seqs=4, max_batched_tokens=32)


class SimulatedMaker:
    """Simulated engines with little memory."""

    lease_s = SimulatedTimes().lease_s

    def make_engine(self, name: str) -> SimulatedEngine:
        """See Maker."""
        return SimulatedEngine(name, 0, CAPACITY)

    def now_s(self) -> float:
        """See Maker."""
        return asyncio.get_running_loop().time()

    def make_request(
        self, request_id: str, n_prompt: int, max_output_tokens: int, stop_token_ids: tuple[int, ...] = ()
    ) -> EngineRequest:
        """See Maker."""
        params = SimulatedParams(frozenset(stop_token_ids))
        return EngineRequest(request_id, list(range(n_prompt)), max_output_tokens, params)


@pytest.mark.parametrize("rule", [*SHARED, *PARKING, *PRECOPY, *OWN, *PRECOPY_OWN], ids=lambda rule: rule.__name__)
@virtual_time
async def test_contract(rule: Callable[[Bed], Awaitable[None]]) -> None:
    """A simulated engine keeps the engine contract."""
    bed = await Bed.make(SimulatedMaker())
    try:
        await rule(bed)
    finally:
        await bed.close()


@virtual_time
async def test_a_renewed_lease_lasts_longer() -> None:
    """Renewed in time, blocks are pinned beyond the end of their first lease, and for one lease more."""
    bed = await Bed.make(SimulatedMaker())
    request = bed.maker.make_request("r", 70, 60)
    await (await bed.a.add("r", request, park=True)).until_end()
    for _ in range(3):
        await asyncio.sleep(0.9 * bed.maker.lease_s)
        assert await bed.a.engine.renew_pin("r")
    await asyncio.sleep(1.1 * bed.maker.lease_s)
    assert not await bed.a.engine.renew_pin("r")
    await bed.settled()
    await bed.close()


@virtual_time
async def test_output_is_a_function_of_the_tokens() -> None:
    """The output equals the reference function's, with chunked prefill and batching."""
    bed = await Bed.make(SimulatedMaker())
    requests = [bed.maker.make_request(f"r{n}", n, 30) for n in (1, 31, 32, 33, 200)]
    heards = [await bed.a.add(r.request_id, r) for r in requests]
    for request, heard in zip(requests, heards, strict=True):
        assert (await heard.until_end()).token_ids == generate(request.prompt_token_ids, 30)
    await bed.close()


def test_any_change_of_tokens_shows() -> None:
    """Losing, repeating or swapping tokens changes the output that follows."""
    tokens = [5, 6, 7, 8]
    variants = ([5, 6, 8], [5, 6, 6, 7, 8], [6, 5, 7, 8], [5, 6, 7, 9])
    outputs = {tuple(generate(variant, 4)) for variant in (tokens, *variants)}
    assert len(outputs) == 5


@virtual_time
async def test_preemption_recomputes() -> None:
    """When blocks run out, the youngest request starts over, which does not show in its output."""
    bed = await Bed.make(SimulatedMaker())
    requests = [bed.maker.make_request(f"r{n}", 200 + n, 150) for n in range(4)]
    heards = [await bed.a.add(r.request_id, r) for r in requests]
    for request, heard in zip(requests, heards, strict=True):
        assert (await heard.until_end()).token_ids == generate(request.prompt_token_ids, 150)
    assert isinstance(bed.a.engine, SimulatedEngine)
    assert bed.a.engine.core.preemptions > 0
    await bed.settled()
    await bed.close()


@virtual_time
async def test_a_read_after_the_lease_is_garbage() -> None:
    """A pull after the end of the lease gives other tokens, and only the source would know, so no caller may do it."""
    bed = await Bed.make(SimulatedMaker())
    request = bed.maker.make_request("s", 50, 40)
    heard = await (await bed.a.add("s", request)).until_tokens(3)
    ticket = await bed.cut("s", heard)
    await asyncio.sleep(bed.maker.lease_s + 1)
    rest = await (await bed.b.add("s~1", request, Resume(list(heard.token_ids), ticket))).until_end()
    assert heard.token_ids + rest.token_ids != generate(request.prompt_token_ids, 40)
    assert isinstance(bed.b.engine, SimulatedEngine)
    assert bed.b.engine.core.stale_reads == 1
    assert (await bed.b.engine.report())[1].failed_pulls == 0
    await bed.close()


@virtual_time
async def test_a_live_puller_renews_the_lease() -> None:
    """A resumed request that waits for blocks keeps its pin alive beyond the lease."""
    bed = await Bed.make(SimulatedMaker())
    assert isinstance(bed.b.engine, SimulatedEngine)
    request = bed.maker.make_request("w", 50, 40)
    heard = await (await bed.a.add("w", request)).until_tokens(3)
    ticket = await bed.cut("w", heard)
    assert await bed.b.engine.reserve("blocker", 62 * 16) is None
    rest = await bed.b.add("w~1", request, Resume(list(heard.token_ids), ticket))
    await asyncio.sleep(3 * bed.maker.lease_s)
    assert not rest.token_ids
    await bed.b.engine.release_reservation("blocker")
    await rest.until_end()
    assert heard.token_ids + rest.token_ids == generate(request.prompt_token_ids, 40)
    assert bed.b.engine.core.stale_reads == 0
    await bed.settled()
    await bed.close()


@virtual_time
async def test_lost_pins_are_recomputed() -> None:
    """A pull whose blocks are gone fails, and the request is recomputed: same tokens."""
    bed = await Bed.make(SimulatedMaker())
    assert isinstance(bed.a.engine, SimulatedEngine)
    request = bed.maker.make_request("g", 50, 40)
    heard = await (await bed.a.add("g", request)).until_tokens(3)
    ticket = await bed.cut("g", heard)
    bed.a.engine.lose_pins()
    rest = await (await bed.b.add("g~1", request, Resume(list(heard.token_ids), ticket))).until_end()
    assert heard.token_ids + rest.token_ids == generate(request.prompt_token_ids, 40)
    assert (await bed.b.engine.report())[1].failed_pulls == 1
    await bed.close()


@virtual_time
async def test_start_can_fail_or_be_stopped() -> None:
    """A start that fails, or is stopped half-way, raises and leaves nothing behind."""
    broken = SimulatedEngine("x", 0, CAPACITY, start_error="no memory")
    with pytest.raises(EngineError, match="no memory"):
        await broken.start()
    await broken.stop(0.0)
    stopped = SimulatedEngine("y", 0, CAPACITY)
    start = asyncio.ensure_future(stopped.start())
    await asyncio.sleep(stopped.times.start_s / 2)
    await stopped.stop(0.0)
    with pytest.raises(EngineError, match="stopped"):
        await start


@virtual_time
async def test_a_hung_engine_is_silent_until_killed() -> None:
    """A hung engine answers nothing, but its pins can still be read; killing it wakes everybody who waits."""
    bed = await Bed.make(SimulatedMaker())
    assert isinstance(bed.a.engine, SimulatedEngine)
    request = bed.maker.make_request("h", 50, 40)
    heard = await (await bed.a.add("h", request)).until_tokens(3)
    ticket = await bed.cut("h", heard)
    bed.a.engine.hang()
    pending = asyncio.ensure_future(bed.a.engine.report())
    rest = await (await bed.b.add("h~1", request, Resume(list(heard.token_ids), ticket))).until_end()
    assert heard.token_ids + rest.token_ids == generate(request.prompt_token_ids, 40)
    assert not pending.done()
    bed.a.engine.kill()
    with pytest.raises(EngineError):
        await pending
    await bed.close()
