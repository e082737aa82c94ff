"""Commands to a real instance: refusals, reservations, pins and leases, undoing a cut, the load report."""

import asyncio
import time
from collections.abc import Callable

import psutil
import pytest
from zoo import (
    BLOCK,
    KINDS,
    MAX_BATCHED_TOKENS,
    MAX_MODEL_LEN,
    MAX_SEQS,
    OTHER,
    USABLE_BLOCKS,
    Attempt,
    Zoo,
    eventually,
    greedy,
    random_prompt,
)

from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.engines.vllm.instance import VllmInstance

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


each_kind = pytest.mark.parametrize("name", KINDS)


async def running(zoo: Zoo, instance: VllmInstance, n_output: int = 1800, n_prompt: int = 40) -> Attempt:
    """A request that will decode for a while; with a prompt of at most 200 it fits the model."""
    attempt = await zoo.start(instance, random_prompt(n_prompt, 5), greedy(n_output))
    await attempt.until_output(3)
    return attempt


@each_kind
async def test_cut_of_an_unknown_request(zoo: Zoo, name: str) -> None:
    """A request that never existed, or has ended, is refused as unknown."""
    instance = zoo.instances[name]
    assert await instance.cut("nobody") == "unknown"
    ended = await zoo.run(instance, random_prompt(10, 1), greedy(3))
    assert await instance.cut(ended.engine_request_id) == "unknown"


@each_kind
async def test_cut_of_a_waiting_request(zoo: Zoo, name: str) -> None:
    """A request that waits for blocks is refused, and runs once there are some."""
    instance = zoo.instances[name]
    prompt, expected = await zoo.window(100, 5)
    reservation_id = await zoo.squeeze(instance, 1)
    attempt = await zoo.start(instance, prompt, greedy(5))
    await eventually(lambda: _is_waiting(instance, attempt), "waiting")
    assert await instance.cut(attempt.engine_request_id) == "waiting"
    await instance.release_reservation(reservation_id)
    assert (await attempt.until_end()).output == expected


async def _is_waiting(instance: VllmInstance, attempt: Attempt) -> bool:
    return attempt.engine_request_id in (await instance.report())[0].waiting_ids


@each_kind
async def test_cut_during_the_prefill(zoo: Zoo, name: str) -> None:
    """A request whose prefill is not finished is refused: between two chunks of a long prompt, or before the first."""
    instance = zoo.instances[name]
    refusals = set()
    for seed in range(50):
        attempt = await zoo.start(instance, random_prompt(MAX_MODEL_LEN - 40, seed), greedy(2))
        while not attempt.ended and "prefilling" not in refusals:
            refusals.add(await instance.cut(attempt.engine_request_id))
        await attempt.until_end()
        assert len(attempt.output) == 2
        if "prefilling" in refusals:
            break
    assert refusals <= {"prefilling", "waiting", "ending", "unknown"}
    assert "prefilling" in refusals


@each_kind
async def test_cut_twice(zoo: Zoo, name: str) -> None:
    """A request that is being cut is refused; the first cut stands."""
    instance = zoo.instances[name]
    answers = []
    for _ in range(50):
        attempt = await running(zoo, instance)
        answers += await asyncio.gather(*(instance.cut(attempt.engine_request_id) for _ in range(3)))
        await attempt.until_end()
        assert attempt.ticket is not None
        await instance.release_pin(attempt.engine_request_id)
        if "already_cut" in answers:
            break
    assert "already_cut" in answers
    assert set(answers) <= {None, "already_cut", "unknown"}


@each_kind
async def test_undo_in_time(zoo: Zoo, name: str) -> None:
    """A cut that is undone before it takes effect leaves no trace: the request runs to its own end."""
    instance = zoo.instances[name]
    prompt, expected = await zoo.window(40, 120)
    attempt = await zoo.start(instance, prompt, greedy(120))
    undone = 0
    while not attempt.ended:
        await attempt.until_output(len(attempt.token_ids) + 2)
        attempt, was_undone = await zoo.cut_and_undo(attempt)
        undone += was_undone
    assert undone
    assert attempt.output == expected


@each_kind
async def test_undo_too_late(zoo: Zoo, name: str) -> None:
    """A cut that has taken effect cannot be undone, nor one that never was."""
    instance = zoo.instances[name]
    attempt = await running(zoo, instance)
    assert not await instance.undo_cut(attempt.engine_request_id)
    assert not await instance.undo_cut("nobody")
    assert await zoo.cut(attempt)
    assert not await instance.undo_cut(attempt.engine_request_id)
    await instance.release_pin(attempt.engine_request_id)


@each_kind
async def test_reservation_holds_blocks(zoo: Zoo, name: str) -> None:
    """A reservation takes one block more than its tokens fill, only once, and its release frees them."""
    instance = zoo.instances[name]
    for n_tokens, n_blocks in ((1, 2), (BLOCK, 2), (BLOCK + 1, 3), (10 * BLOCK, 11)):
        for _ in range(2):  # asking again with the same id changes nothing
            assert await instance.reserve("a", n_tokens) is None
        report, counters = await instance.report()
        assert (report.kv_blocks_used, counters.reserved) == (n_blocks, 1)
        for _ in range(2):
            await instance.release_reservation("a")
        report, counters = await instance.report()
        assert (report.kv_blocks_used, counters.reserved) == (0, 0)


@each_kind
async def test_reservation_without_blocks(zoo: Zoo, name: str) -> None:
    """Without enough free blocks a reservation is refused, and nothing is held."""
    instance = zoo.instances[name]
    assert await instance.reserve("all", (USABLE_BLOCKS - 1) * BLOCK) is None
    assert (await instance.report())[0].kv_blocks_used == USABLE_BLOCKS
    assert await instance.reserve("more", 1) == "no_blocks"
    await instance.release_reservation("all")
    assert await instance.reserve("all", USABLE_BLOCKS * BLOCK) == "no_blocks"
    assert (await instance.report())[1].reserved == 0


@each_kind
async def test_reservation_without_slots(zoo: Zoo, name: str) -> None:
    """Running requests and reservations together do not exceed the batch."""
    instance = zoo.instances[name]
    attempt = await running(zoo, instance)
    ids = [f"s{number}" for number in range(MAX_SEQS)]
    answers = await asyncio.gather(*(instance.reserve(reservation_id, 1) for reservation_id in ids))
    assert answers == [None] * (MAX_SEQS - 1) + ["no_slot"]
    await asyncio.gather(*(instance.release_reservation(reservation_id) for reservation_id in ids))
    await instance.abort([attempt.engine_request_id])


@pytest.mark.runner("V1")
async def test_reservation_expires(zoo: Zoo) -> None:
    """A reservation that is never claimed expires."""
    instance = zoo.instances["sync"]
    assert KINDS["sync"].reservation_life_s is not None
    assert await instance.reserve("forgotten", 100) is None

    async def gone() -> bool:
        return (await zoo.counters(instance)).reserved == 0

    await eventually(gone, "expired")
    assert (await instance.report())[0].kv_blocks_used == 0


@each_kind
async def test_resume_takes_its_reservation_over(zoo: Zoo, name: str) -> None:
    """A resumed request gets its reserved room, even if there is no other, and the reservation is gone."""
    here, there = zoo.instances[OTHER[name]], zoo.instances[name]
    prompt, expected = await zoo.window(90, 200)
    attempt = await zoo.start(here, prompt, greedy(200))
    await attempt.until_output(3)
    assert await there.reserve("room", 90 + 200) is None
    rest = await zoo.squeeze(there, 0)
    assert await there.reserve("none", 1) == "no_blocks"
    assert await zoo.cut(attempt)
    attempt = await zoo.resume(attempt, there, ticket=attempt.ticket, reservation_id="room")
    await attempt.until_output(1)
    assert (await zoo.counters(there)).reserved == 1  # the rest
    await attempt.until_end()
    await there.release_reservation(rest)
    assert attempt.output == expected


@each_kind
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_pin_is_released_on_command(zoo: Zoo, name: str, *, busy: bool) -> None:
    """
    Pinned blocks are freed on command, whether it comes before or after the step that tells the worker of the pin.

    The order is decided within microseconds, so many cuts are tried; the instance is otherwise idle or has another
    request.
    """
    instance = zoo.instances[name]
    other = await running(zoo, instance) if busy else None
    for number in range(12):
        attempt = await running(zoo, instance, n_prompt=100)
        assert await zoo.cut(attempt)
        if number % 3:  # some steps later
            await zoo.run(instance, random_prompt(4, number), greedy(number % 3))
            assert (await zoo.counters(instance)).pinned == 1
        await instance.release_pin(attempt.engine_request_id)
        if number % 2:  # twice is harmless
            await instance.release_pin(attempt.engine_request_id)
        await eventually(lambda: _pins(zoo, instance, 0), "released")
    if other is not None:
        await instance.abort([other.engine_request_id])


async def _pins(zoo: Zoo, instance: VllmInstance, n_pins: int) -> bool:
    return (await zoo.counters(instance)).pinned == n_pins


@each_kind
async def test_cut_pins_exactly_what_is_computed(zoo: Zoo, name: str) -> None:
    """The blocks of a cut request stay in use until they are pulled or released, and are then free."""
    instance = zoo.instances[name]
    attempt = await running(zoo, instance, n_prompt=100)
    assert await zoo.cut(attempt)
    report, counters = await instance.report()
    assert counters.pinned == 1
    assert report.running_ids == report.waiting_ids == ()
    assert report.kv_blocks_used == -(-(attempt.n_tokens - 1) // BLOCK)
    await instance.release_pin(attempt.engine_request_id)


@each_kind
async def test_release_after_the_pull(zoo: Zoo, name: str) -> None:
    """Releasing a pin that has been pulled already, or never existed, is harmless."""
    instance, there = zoo.instances[name], zoo.instances[OTHER[name]]
    prompt, expected = await zoo.window(50, 150)
    attempt = await zoo.start(instance, prompt, greedy(150), hold_at=60)
    await attempt.until_output(4)
    moved = await (await zoo.move(attempt, there)).until_end()
    assert moved is not attempt
    await instance.release_pin(attempt.engine_request_id)
    await instance.release_pin("nobody")
    assert moved.output == expected
    assert (await zoo.run(instance, prompt, greedy(150))).output == expected


@pytest.mark.runner("V1")
async def test_lease_ends(zoo: Zoo) -> None:
    """Blocks that are never pulled or released are freed when the lease ends, on an idle instance too."""
    instance = zoo.instances["sync+cache"]
    attempt = await running(zoo, instance)
    assert await zoo.cut(attempt)
    assert (await zoo.counters(instance)).pinned == 1
    await zoo.settled(deadline_s=60)


@each_kind
async def test_abort_of_a_resumed_request(zoo: Zoo, name: str) -> None:
    """
    A client that leaves during the transfer frees both sides well before the lease ends.

    The request is aborted at once, while it waits for its KV cache, or in its first steps. As in the runtime, the pin
    is released as well.
    """
    here, there = zoo.instances[OTHER[name]], zoo.instances[name]
    for number in range(12):
        attempt = await running(zoo, here, n_prompt=200)
        assert await there.reserve(f"x{number}", attempt.n_tokens) is None
        assert await zoo.cut(attempt)
        resumed = await zoo.resume(attempt, there, ticket=attempt.ticket, reservation_id=f"x{number}")
        for _ in range(number % 4):
            await there.report()  # a little later
        await there.abort([resumed.engine_request_id])
        await here.release_pin(attempt.engine_request_id)
        await there.release_reservation(f"x{number}")
    await zoo.settled()


@each_kind
async def test_abort_of_a_resumed_request_that_waits(zoo: Zoo, name: str) -> None:
    """A resumed request that finds no room and is aborted while it waits frees the source's blocks."""
    here, there = zoo.instances[OTHER[name]], zoo.instances[name]
    rest = await zoo.squeeze(there, 1)
    attempt = await running(zoo, here, n_prompt=200)
    assert await zoo.cut(attempt)
    resumed = await zoo.resume(attempt, there, ticket=attempt.ticket)
    await eventually(lambda: _is_waiting(there, resumed), "waiting")
    await there.abort([resumed.engine_request_id])
    await here.release_pin(attempt.engine_request_id)
    await there.release_reservation(rest)


@each_kind
async def test_resumed_request_waits_for_room(zoo: Zoo, name: str) -> None:
    """A resumed request that finds no room waits, and pulls its KV cache once there is some."""
    here, there = zoo.instances[OTHER[name]], zoo.instances[name]
    before = await zoo.counters(there)
    prompt, expected = await zoo.window(120, 150)
    rest = await zoo.squeeze(there, 1)
    attempt = await zoo.start(here, prompt, greedy(150))
    await attempt.until_output(3)
    assert await zoo.cut(attempt)
    resumed = await zoo.resume(attempt, there, ticket=attempt.ticket)
    await eventually(lambda: _is_waiting(there, resumed), "waiting")
    await there.release_reservation(rest)
    assert (await resumed.until_end()).output == expected
    assert (await zoo.counters(there)).pulls == before.pulls + 1


@each_kind
@pytest.mark.parametrize("when", ["running", "cut", "pinned"])
async def test_abort_at_the_source(zoo: Zoo, name: str, when: str) -> None:
    """A client that leaves before, during or after the cut leaves nothing behind."""
    instance = zoo.instances[name]
    for _ in range(5):
        attempt = await running(zoo, instance)
        if when == "cut":
            await asyncio.gather(instance.cut(attempt.engine_request_id), instance.abort([attempt.engine_request_id]))
        elif when == "pinned":
            assert await zoo.cut(attempt)
        await instance.abort([attempt.engine_request_id])
        await instance.release_pin(attempt.engine_request_id)
    await zoo.settled()


@each_kind
async def test_load_report(zoo: Zoo, name: str) -> None:
    """The report lists every request with its length, the blocks in use, and what was scheduled."""
    instance = zoo.instances[name]
    before = await zoo.counters(instance)
    prompts = [random_prompt(n_tokens, 7) for n_tokens in (10, 33, 100)]
    attempts = [await zoo.start(instance, prompt, greedy(1500)) for prompt in prompts]
    for attempt in attempts:
        await attempt.until_output(2)
    rest = await zoo.squeeze(instance, 40)
    waiting = await zoo.start(instance, random_prompt(1800, 7), greedy(5))
    await eventually(lambda: _is_waiting(instance, waiting), "waiting")
    seen = [attempt.n_tokens for attempt in attempts]
    report, counters = await instance.report()
    await instance.abort([attempt.engine_request_id for attempt in (*attempts, waiting)])
    assert report.running_ids == tuple(attempt.engine_request_id for attempt in attempts)
    assert (report.waiting_ids, report.waiting_tokens) == ((waiting.engine_request_id,), (1800,))
    of_requests = report.kv_blocks_used - counters.held_blocks["reservations"]
    assert -1 <= of_requests - sum(-(-n // BLOCK) for n in report.running_tokens) <= len(attempts)
    assert counters.reserved == 1
    assert counters.pinned == 0
    n_prompt_tokens = sum(map(len, prompts))
    n_new = sum(report.running_tokens) - n_prompt_tokens
    assert counters.scheduled_tokens - before.scheduled_tokens >= n_prompt_tokens + n_new - len(attempts)
    assert 0 < counters.steps - before.steps <= n_new + len(attempts)
    assert report.step_s >= 0.0
    await instance.release_reservation(rest)
    await zoo.settled()  # all that was sent has come
    for attempt, low, said in zip(attempts, seen, report.running_tokens, strict=True):
        assert low <= said <= attempt.n_tokens, "what is counted is sent"


@each_kind
async def test_steps_are_timed(zoo: Zoo, name: str) -> None:
    """Each step is reported once, with its batch; the busy seconds never exceed the time that passed."""
    instance = zoo.instances[name]
    before = await zoo.counters(instance)
    begun_s = time.monotonic()
    await (await zoo.start(instance, random_prompt(300, 11), greedy(20))).until_end()
    steps: list[StepSample] = []

    async def all_reported() -> bool:
        report, counters = await instance.report()
        steps.extend(report.steps)
        return not report.running_ids and len(steps) == counters.steps - before.steps

    await eventually(all_reported, "every step reported")
    passed_s = time.monotonic() - begun_s
    chunks = [s.batch.prefill_tokens for s in steps if s.batch.prefill_tokens]
    assert chunks == [MAX_BATCHED_TOKENS, 300 - MAX_BATCHED_TOKENS]
    assert sum(s.batch.prefill_attention_tokens for s in steps) == 300 * 301 / 2
    lengths = [s.batch.decode_kv_tokens for s in steps if s.batch.n_decode]
    assert lengths[:19] == list(range(301, 320))
    assert all(s.batch.n_decode == 1 and s.batch.decode_kv_tokens_max == s.batch.decode_kv_tokens for s in steps[2:])
    assert 0.0 < sum(s.step_s for s in steps) <= passed_s


@pytest.mark.runner("V1")
async def test_identity(zoo: Zoo) -> None:
    """An instance reports what its step times depend on: the tiny model's sizes, the processor, the backend."""
    told = await zoo.instances["sync"].identity()
    engine = told.engine
    assert (engine.layers, engine.hidden_size, engine.query_heads, engine.kv_heads) == (3, 128, 4, 2)
    assert (engine.dtype, engine.attention_backend) == ("float32", "CPU_ATTN")
    assert engine.threads >= 1
    assert (engine.tensor_parallel, engine.eager, engine.asynchronous) == (1, True, False)
    assert told.kv_bytes_per_token == 2 * 3 * 2 * engine.head_size * 4  # K and V, layers, KV heads, float32
    assert told.multiprocessors is None
    assert told.graph_tokens == 0
    assert (await zoo.instances["async"].identity()).engine.asynchronous


@pytest.mark.quick_v2
async def test_hung_instance_fails_its_test(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a request on an instance that has stopped ends with an error at the deadline of all waits."""
    instance = zoo.instances["async"]
    prompt, expected = await zoo.window(40, 60)
    process = psutil.Process(instance.pid)
    process.suspend()
    try:
        attempt = await zoo.start(instance, prompt, greedy(60))
        monkeypatch.setattr("zoo.DEADLINE_S", 1.0)
        with pytest.raises(TimeoutError):
            await attempt.until_end()
    finally:
        process.resume()
    monkeypatch.undo()
    assert (await attempt.until_end()).output == expected


async def test_idle_instances_sleep(zoo: Zoo) -> None:
    """Idle instances use no processor time (by default, NIXL's progress thread would keep a whole core busy)."""
    processes = [psutil.Process(instance.pid) for instance in zoo.instances.values()]
    times: Callable[[], float] = lambda: sum(sum(process.cpu_times()[:2]) for process in processes)  # noqa: E731
    before_s = times()
    await asyncio.sleep(1.0)
    assert times() - before_s < 0.5
