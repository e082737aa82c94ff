"""
Instances that die or hang and clients that leave, at each step of a migration, on real engines.

Whatever happens, a request that is still wanted ends with the tokens it gets alone, and nothing is left behind anywhere
(the fixture `cluster` checks that every instance is up again and holds nothing).
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from zoo import eventually, greedy, random_prompt

from cascadeinfer.core.migration import Action
from cascadeinfer.runtime.migrate import MigrationRecord
from cluster import BEYOND_EDGES, Cluster

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

N_OUTPUT = 130
PROMPT = random_prompt(40, 3)
"""Dispatched to instance 0; moves to 1 and then to 2."""
OTHER_PROMPT = random_prompt(150, 5)
"""Lives on instance 2, which takes no part in the first move."""

Kill = Callable[[str], None]


@pytest.fixture
def kill(cluster: Cluster) -> Kill:
    """Ends an instance's process at once."""

    def kill(instance_id: str) -> None:
        pid = cluster.instance(instance_id).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    return kill


async def references(cluster: Cluster, *prompts: list[int]) -> list[Any]:
    """The output of each prompt run alone."""
    return [(await cluster.alone(prompt, greedy(N_OUTPUT)))[0].token_ids for prompt in prompts]


async def outputs(cluster: Cluster, *prompts: list[int], hold_at: Sequence[int] = ()) -> list[Any]:
    """The outputs of the prompts run together, with moves; see `Cluster.stream`."""
    runs = (cluster.run(prompt, greedy(N_OUTPUT), hold_at=hold_at) for prompt in prompts)
    completions = await asyncio.gather(*runs)
    return [completion.token_ids for [completion] in completions]


def restarts(cluster: Cluster) -> int:
    """Restarts of all instances so far."""
    return sum(instance["restarts"] for instance in cluster.runtime.snapshot()["instances"])


@pytest.mark.parametrize(
    ("victim", "action", "before"),
    [
        ("source", Action.ASK_ROOM, False),
        ("source", Action.COPY, True),
        ("source", Action.COPY, False),
        ("source", Action.CUT, False),
        ("source", Action.RESUME, True),
        ("source", Action.RESUME, False),
        ("target", Action.ASK_ROOM, False),
        ("target", Action.COPY, False),
        ("target", Action.CUT, False),
        ("target", Action.RESUME, True),
        ("target", Action.RESUME, False),
        ("bystander", Action.CUT, False),
        ("bystander", Action.RESUME, False),
    ],
)
async def test_kill_during_a_migration(
    cluster: Cluster, kill: Kill, victim: str, action: Action, *, before: bool
) -> None:
    """An instance killed at this step affects no other, and every request gets the tokens it gets alone."""
    expected = await references(cluster, PROMPT, OTHER_PROMPT)
    restarted = restarts(cluster)

    def strike(record: MigrationRecord) -> None:
        migration = record.migration
        [bystander] = {"0", "1", "2"} - {migration.source_id, migration.target_id}
        kill({"source": migration.source_id, "target": migration.target_id, "bystander": bystander}[victim])

    with cluster.on_action(action, strike, before=before) as struck:
        assert await outputs(cluster, PROMPT, OTHER_PROMPT, hold_at=BEYOND_EDGES[:1]) == expected
    assert struck
    # On a busy machine the death may be noticed after the request's end.
    await eventually(lambda: restarts(cluster) == restarted + 1, "one restart")


async def test_restarted_instance_takes_part_again(cluster: Cluster, kill: Kill) -> None:
    """An idle instance that is killed comes back and connects to the others; requests move to it and from it."""
    [expected] = await references(cluster, PROMPT)
    before = cluster.instance("1")
    kill("1")
    await eventually(lambda: cluster.runtime.fleet.engine("1") is None, "noticed")
    await cluster.all_up()
    assert cluster.instance("1") is not before
    moves = cluster.migrations("moved")
    assert await outputs(cluster, PROMPT, hold_at=BEYOND_EDGES) == [expected]
    assert cluster.migrations("moved") == moves + 2
    [_, second, third] = [(await engine.report())[1] for engine in cluster.runtime.live_engines()]
    assert second.pulls >= 1
    assert third.failed_pulls == 0


async def test_all_instances_die(cluster: Cluster, kill: Kill) -> None:
    """With all instances down, old and new requests wait for the first that returns; health reports it meanwhile."""
    from vllm.v1.engine.exceptions import EngineDeadError

    expected = await references(cluster, PROMPT, OTHER_PROMPT)
    first = asyncio.ensure_future(outputs(cluster, PROMPT))
    await eventually(lambda: cluster.runtime.n_live_requests == 1, "placed")
    for instance_id in ("0", "1", "2"):
        kill(instance_id)
    await eventually(lambda: not cluster.runtime.live_engines(), "all down")
    with pytest.raises(EngineDeadError):
        await cluster.llm.check_health()
    assert not cluster.llm.errored
    [second] = await outputs(cluster, OTHER_PROMPT)
    assert [*await first, second] == expected
    await cluster.all_up()
    await cluster.llm.check_health()


async def test_kill_under_load(cluster: Cluster, kill: Kill, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen requests, waiting, in prefill, decoding and moving, survive the death of each instance in turn."""
    monkeypatch.setattr(cluster.runtime._isolation._quarantine, "_deaths", 4)
    prompts = [random_prompt(n_tokens, 11) for n_tokens in (5, 20, 35, 50, 63, 80, 95, 110, 127, 140, 400, 900)]
    expected = await references(cluster, *prompts)
    running = asyncio.ensure_future(outputs(cluster, *prompts))
    for instance_id in ("1", "0", "2"):
        seen = cluster.migrations()
        await eventually(lambda seen=seen: running.done() or cluster.migrations() > seen, "some migration")
        if cluster.runtime.fleet.engine(instance_id) is not None:
            kill(instance_id)
    assert await running == expected


async def test_poison_is_ended(cluster: Cluster, kill: Kill) -> None:
    """A request whose instance dies under it twice ends with HTTP 500 and a named reason; its neighbour completes."""
    from vllm.exceptions import GracefulHTTPError

    expected = await references(cluster, OTHER_PROMPT)
    other = asyncio.ensure_future(outputs(cluster, OTHER_PROMPT))
    poison = asyncio.ensure_future(cluster.run(PROMPT, greedy(N_OUTPUT)))

    def where() -> str | None:
        """The instance that has given the request a token, unless it is about to move."""
        stream = next((s for s in cluster.runtime._streams if s.request.prompt_token_ids == PROMPT), None)
        at_rest = stream is not None and stream.migration is None and stream.started
        return stream.instance_id if stream is not None and at_rest else None

    for _ in range(2):
        await eventually(lambda: where() is not None, "it runs")
        place = where()
        assert place is not None
        kill(place)
        await eventually(lambda place=place: cluster.runtime.fleet.engine(place) is None, "the death is known")
    with pytest.raises(GracefulHTTPError, match="poison_request"):
        await poison
    assert await other == expected
    assert cluster.runtime.snapshot()["poison"][-1]["deaths"] == 2


@pytest.mark.runner("V1")  # on V2 a seed survives
async def test_pinned_request_of_a_dead_instance(cluster: Cluster, kill: Kill) -> None:
    """A request whose sampling state is lost completes elsewhere and is counted as inexact."""
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.9, seed=5, max_tokens=N_OUTPUT, ignore_eos=True)
    inexact = cluster.metric("cascadeinfer_recovered_requests_total", exact="no")
    running = asyncio.ensure_future(cluster.run(PROMPT, params))
    await eventually(lambda: _output_so_far(cluster) > 20, "well on its way")
    kill("0")
    [completion] = await running
    assert len(completion.token_ids) == N_OUTPUT
    assert cluster.metric("cascadeinfer_recovered_requests_total", exact="no") == inexact + 1


def _output_so_far(cluster: Cluster) -> int:
    return sum(len(stream.output_token_ids) for stream in cluster.runtime._streams)


@pytest.mark.parametrize("victim", ["0", "2"])
async def test_hung_instance(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """An instance that stops answering is killed, and its requests go on elsewhere."""
    expected = await references(cluster, PROMPT, OTHER_PROMPT)
    restarted = restarts(cluster)
    supervisor = cluster.runtime.fleet[victim].supervisor
    hung = cluster.instance(victim)
    assert hung.pid is not None
    running = asyncio.ensure_future(outputs(cluster, PROMPT, OTHER_PROMPT))
    await eventually(lambda: _output_so_far(cluster) > 10, "both on their way")
    monkeypatch.setattr(supervisor, "_times", dataclasses.replace(supervisor._times, hang_s=1.0))
    await asyncio.sleep(2 * supervisor._times.report_s)  # the pending poll has the old limit
    os.kill(hung.pid, signal.SIGSTOP)
    await eventually(lambda: cluster.runtime.fleet.engine(victim) is not hung, "noticed")
    monkeypatch.undo()
    assert await running == expected
    await eventually(lambda: restarts(cluster) == restarted + 1, "one restart")
    assert "hung" in supervisor.last_error


async def test_stopped_instance_is_left_out(cluster: Cluster) -> None:
    """A paused instance gets nothing new, others answer the requests waiting there, and nothing is restarted."""
    prompts = [random_prompt(40, seed) for seed in (3, 7, 8)]  # dispatched to instance 0
    expected = await references(cluster, *prompts)
    restarted = restarts(cluster)
    stopped = cluster.instance("0")
    assert stopped.pid is not None
    state = cluster.runtime.fleet["0"]
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        assert await outputs(cluster, *prompts) == expected  # some are placed there before it is suspected
        assert state.suspect
        assert await outputs(cluster, *prompts) == expected
        assert not cluster.runtime.tally()["on_instance"]
        assert state.suspect
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    await eventually(lambda: not state.suspect, "trusted again")
    assert cluster.runtime.fleet.engine("0") is stopped
    assert restarts(cluster) == restarted


@pytest.mark.parametrize("limit", ["ask_s", "cut_s", "resume_s"])
async def test_step_that_takes_too_long(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """
    A step that times out is reverted: the request stays, or returns to its source.

    The output is the same each time.
    """
    [expected] = await references(cluster, PROMPT)
    migrator = cluster.runtime._migrator
    before = {outcome: cluster.migrations(outcome) for outcome in ("moved", "recomputed", "stayed", "ended")}
    monkeypatch.setattr(migrator, "_limits", dataclasses.replace(migrator._limits, **{limit: 0.0}))
    assert await outputs(cluster, PROMPT) == [expected]
    happened = {outcome for outcome, count in before.items() if cluster.migrations(outcome) > count}
    assert "stayed" in happened
    assert happened <= {"stayed", "ended"}


@pytest.mark.parametrize("action", [Action.COPY, Action.CUT, Action.RESUME])
async def test_source_stands_still(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, action: Action) -> None:
    """A source that stops answering during a migration and later resumes costs time, not tokens."""
    [expected] = await references(cluster, PROMPT)
    migrator = cluster.runtime._migrator
    monkeypatch.setattr(migrator, "_limits", dataclasses.replace(migrator._limits, cut_s=0.5, resume_s=0.5))
    loop = asyncio.get_running_loop()

    def freeze(record: MigrationRecord) -> None:
        pid = cluster.instance(record.migration.source_id).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        loop.call_later(1.0, os.kill, pid, signal.SIGCONT)

    restarted = restarts(cluster)
    with cluster.on_action(action, freeze) as frozen:
        assert await outputs(cluster, PROMPT, hold_at=BEYOND_EDGES[:1]) == [expected]
    assert frozen
    await cluster.settled()
    assert restarts(cluster) == restarted


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("action", [Action.ASK_ROOM, Action.COPY, Action.CUT, Action.RESUME])
async def test_client_leaves_during_a_migration(cluster: Cluster, action: Action, delay_s: float) -> None:
    """A client that disconnects at any step leaves nothing on either side, long before a lease ends."""
    request = asyncio.ensure_future(cluster.run(PROMPT, greedy(N_OUTPUT), hold_at=BEYOND_EDGES[:1]))
    loop = asyncio.get_running_loop()
    with cluster.on_action(action, lambda _: _later(loop.call_later, delay_s, request.cancel)) as struck:
        with contextlib.suppress(asyncio.CancelledError):
            await request
        assert struck
    assert cluster.runtime.n_live_requests == 0
    await cluster.settled()


def _later(call_later: Callable[..., Any], delay_s: float, do: Callable[[], Any]) -> Awaitable[None] | None:
    call_later(delay_s, do)
    return None


async def test_client_leaves_while_all_is_calm(cluster: Cluster) -> None:
    """A client that disconnects before the first token, or later, frees its request's blocks."""
    for n_tokens in (0, 1, 10):
        request = asyncio.ensure_future(cluster.run(OTHER_PROMPT, greedy(N_OUTPUT)))
        await eventually(
            lambda n=n_tokens: _output_so_far(cluster) >= n and len(cluster.runtime._streams) == 1, "begun"
        )
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        await cluster.settled()


async def test_clients_leave_in_the_storm(cluster: Cluster) -> None:
    """Of 20 requests that move around, every other one is abandoned at some point; the rest get their tokens."""
    prompts = [random_prompt(30 + 4 * number, 21) for number in range(10)]
    expected = await references(cluster, *prompts)
    abandoned = [asyncio.ensure_future(cluster.run(random_prompt(45, n), greedy(N_OUTPUT))) for n in range(10)]
    loop = asyncio.get_running_loop()
    for number, request in enumerate(abandoned):
        loop.call_later(0.1 * number, request.cancel)
    assert await outputs(cluster, *prompts) == expected
    ends = await asyncio.gather(*abandoned, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError | list) for end in ends)
