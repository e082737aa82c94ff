"""An instance that is alive but silent or slow: who gets its requests, when it is suspected and when trusted again."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from runtime_cluster import SUPERVISION, TIMES, Client, Cluster, ScriptedPolicy

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.events import InstanceSuspected, InstanceTrusted, PinReason
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.simulated.model import SimulatedTimes
from cascadeinfer.runtime.answers import SLICES, AnswerWatch
from support.virtual_time import VirtualTimeLoop, run, virtual_time

PATIENT = replace(SUPERVISION, hang_s=60.0)
LAYOUT = StageLayout.from_boundaries((100,), (("a", "b"), ("c",)))
MAKERS = {
    **{name: POLICIES[name].make for name in POLICIES if name != "static_stages"},
    "static_stages": lambda: POLICIES["static_stages"].make(layout=LAYOUT),
    "cascade in stages": lambda: Cascade(layout=LAYOUT),
    "cascade with a queue": lambda: Cascade(max_queued=20),
}


def suspects(cluster: Cluster) -> list[str]:
    """The suspect instances, as operators see them."""
    return [i["id"] for i in cluster.runtime.snapshot()["instances"] if i["suspect"]]


@pytest.mark.parametrize("name", MAKERS)
@virtual_time
async def test_nobody_waits_for_a_silent_instance(name: str) -> None:
    """
    Under every policy, answering instances get the new requests and those waiting at the silent one; none restarts.

    Until it is suspected, a silent instance gets its share; those requests wait there until then.
    """
    async with Cluster(MAKERS[name](), supervision=PATIENT) as cluster:
        early = [await cluster.submit(f"e{number}", 40, 30) for number in range(3)]
        for client in early:
            await client.until_tokens(2)
        cluster["a"].freeze()
        waiting = [await cluster.submit(f"w{number}", 40 + number % 2 * 100, 30) for number in range(9)]
        stuck = [client for client in waiting if cluster.where(client.request.request_id) == "a"]
        await cluster.until(lambda: suspects(cluster) == ["a"], "a is suspected")
        assert not [client for client in stuck if cluster.where(client.request.request_id) == "a"]
        late = [await cluster.submit(f"l{number}", 40 + number % 2 * 100, 30) for number in range(9)]
        assert not [client for client in late if cluster.where(client.request.request_id) == "a"]
        for client in waiting + late:
            await client.until_end()
            assert client.finish_reason == "length"
        assert suspects(cluster) == ["a"]
        assert cluster.registry.get_sample_value("cascadeinfer_withdrawn_requests_total") == len(stuck)
        cluster["a"].thaw()
        await cluster.until(lambda: not suspects(cluster), "a is trusted")
        for client in early:
            await client.until_end()
        assert all(len(generation) == 1 for generation in cluster.engines.values())


@virtual_time
async def test_when_nobody_answers_everybody_is_used() -> None:
    """With all instances silent, requests are placed as usual, and none is withdrawn: there is nowhere to go."""
    policy = ScriptedPolicy()
    async with Cluster(policy, supervision=PATIENT) as cluster:
        for name in "abc":
            cluster[name].freeze()
        clients = [await cluster.submit(f"r{number}") for number in range(6)]
        await cluster.until(lambda: suspects(cluster) == ["a", "b", "c"], "all suspected")
        clients += [await cluster.submit(f"s{number}") for number in range(3)]
        assert {cluster.where(client.request.request_id) for client in clients} == {"a", "b", "c"}
        for name in "abc":
            cluster[name].thaw()
        for client in clients:
            await client.until_end()
        await cluster.until(lambda: not suspects(cluster), "all trusted")
        assert sum(isinstance(event, InstanceTrusted) for event in policy.events) == 3


@virtual_time
async def test_what_waits_goes_to_one_that_answers_later() -> None:
    """After all have been silent, one answers again and gets the requests waiting at the other."""
    async with Cluster(ScriptedPolicy({"r": "a"}), "ab", supervision=PATIENT) as cluster:
        for name in "ab":
            cluster[name].freeze()
        client = await cluster.submit("r")
        await cluster.until(lambda: suspects(cluster) == ["a", "b"])
        place = cluster.where("r")
        assert place is not None
        other = "ab".replace(place, "")
        cluster[other].thaw()
        await client.until_end()
        assert client.finish_reason == "length"
        assert suspects(cluster) == [place]
        cluster[place].thaw()
        await cluster.until(lambda: not suspects(cluster))


@virtual_time
async def test_what_runs_stays_and_what_is_pinned_waits_elsewhere() -> None:
    """A request with tokens stays with its KV cache; an unstarted one goes, whatever pins it; both complete."""
    async with Cluster(ScriptedPolicy({"r": "a", "p": "a"}), supervision=PATIENT) as cluster:
        running = await cluster.submit("r", 40, 200)
        await running.until_tokens(3)
        cluster["a"].freeze()
        pinned = await cluster.submit("p", 40, 20, pin_reason=PinReason.SEEDED_SAMPLING)
        await pinned.until_end()
        assert cluster.where("r") == "a"
        assert suspects(cluster) == ["a"]
        cluster["a"].thaw()
        await running.until_end()
        assert running.finish_reason == pinned.finish_reason == "length"


@virtual_time
async def test_a_request_does_not_wander_for_ever() -> None:
    """Every instance it goes to falls silent: after two withdrawals it stays, and resumes with its instance."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=PATIENT) as cluster:
        for name in "abc":
            cluster[name].pause()
        client = await cluster.submit("r")
        places = []
        for _ in range(3):
            place = cluster.where("r")
            assert place is not None
            places.append(place)
            cluster[place].freeze()
            await cluster.until(lambda place=place: suspects(cluster) == [place], f"{place} is suspected")
            cluster[place].thaw()
            await cluster.until(lambda: not suspects(cluster), f"{place} is trusted")
        assert places[0] != places[1]
        assert cluster.where("r") == places[2]
        assert sum(len(e.withdrawn_ids) for e in policy.events if isinstance(e, InstanceSuspected)) == 2
        for name in "abc":
            cluster[name].unpause()
        await client.until_end()


@virtual_time
async def test_a_timed_out_resume_goes_back_to_a_place_that_answers() -> None:
    """If the target falls silent before its first token, the source takes the request back before any kill."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=PATIENT) as cluster:
        client = await cluster.submit("r", 100, 60)
        await client.until_tokens(5)
        cluster["b"].pause()
        cluster.move("r", "b")
        await cluster.until(lambda: (m := cluster.migration("r")) is not None and m.at_target)
        cluster["b"].freeze()
        await client.until_end()
        assert client.finish_reason == "length"
        assert [(e.outcome, e.detail) for e in policy.ended_migrations()] == [("stayed", "timed_out")]
        assert suspects(cluster) == ["b"]
        cluster["b"].thaw()
        cluster["b"].unpause()
        await cluster.until(lambda: not suspects(cluster))


@virtual_time
async def test_neither_source_nor_target_answers() -> None:
    """Both fall silent during a migration: the third instance recomputes the request."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, supervision=PATIENT) as cluster:
        client = await cluster.submit("r", 100, 60)
        await client.until_tokens(5)
        cluster["b"].pause()
        cluster.move("r", "b")
        await cluster.until(lambda: (m := cluster.migration("r")) is not None and m.at_target)
        for name in "ab":
            cluster[name].freeze()
        await client.until_end()
        assert client.finish_reason == "length"
        assert [e.outcome for e in policy.ended_migrations()] == ["lost"]
        assert suspects(cluster) == ["a", "b"]
        for name in "ab":
            cluster[name].thaw()
            cluster[name].unpause()
        await cluster.until(lambda: not suspects(cluster))


# --- the watch --------------------------------------------------------------------------------------------------------


@virtual_time
async def test_suspicion_ends_with_an_answer_in_time() -> None:
    """The late report does not count; the next one does."""
    said: list[str] = []
    watch = AnswerWatch(1.0, 0.1, lambda: said.append("suspected"), lambda: said.append("trusted"))
    watch.asked()
    await asyncio.sleep(0.9)
    watch.answered()
    watch.asked()
    await asyncio.sleep(1.8)
    assert not said, "answers of 0.9 s are usual here"
    await asyncio.sleep(0.2)
    assert said == ["suspected"]
    watch.answered()
    assert said == ["suspected"]
    watch.asked()
    watch.answered()
    assert said == ["suspected", "trusted"]
    assert watch.limit_s > 2.0
    for _ in range(100):
        watch.asked()
        watch.answered()
    assert watch.limit_s == pytest.approx(1.0, abs=1e-3)


@virtual_time
async def test_own_pause_is_not_counted() -> None:
    """A process that was paused for a minute suspects no instance until the limit has passed again."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    said: list[str] = []
    watch = AnswerWatch(1.0, 0.1, lambda: said.append("suspected"), lambda: said.append("trusted"))
    watch.asked()
    await asyncio.sleep(0.6)
    loop._virtual_now_s += 60.0  # nothing ran meanwhile
    await asyncio.sleep(0.9)
    assert not said
    await asyncio.sleep(1.0 / SLICES + 0.1)
    assert said == ["suspected"]
    watch.stop()


# --- slow ones --------------------------------------------------------------------------------------------------------

MODEL = StepModel(
    base_s=0.01, per_decode_s=2e-4, per_kv_token_s=1e-6, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-9
)
ROOMY = InstanceCapacity(kv_blocks=4000, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=2048)
N_REQUESTS = 120
SLOW = 10.0


async def serve(policy: Policy, *, gap_s: float) -> tuple[float, float]:
    """
    Three instances, the first slowed by this factor. Returns its share of
    the requests and their p90 latency in seconds.
    """
    times = SimulatedTimes(step_model=MODEL)
    async with Cluster(policy, capacity=ROOMY, times=times, supervision=PATIENT) as cluster:
        slowed = replace(
            MODEL,
            base_s=SLOW * MODEL.base_s,
            per_decode_s=SLOW * MODEL.per_decode_s,
            per_kv_token_s=SLOW * MODEL.per_kv_token_s,
            per_prefill_token_s=SLOW * MODEL.per_prefill_token_s,
        )
        cluster["a"].times = cluster["a"].core.times = replace(TIMES, step_model=slowed)
        loop = asyncio.get_running_loop()
        latencies_s: list[float] = []
        there = 0

        async def wait(client: Client, sent_s: float) -> None:
            await client.until_end()
            latencies_s.append(loop.time() - sent_s)

        waits = []
        for number in range(N_REQUESTS):
            client = await cluster.submit(f"r{number}", 50, 40)
            there += cluster.where(f"r{number}") == "a"
            waits.append(loop.create_task(wait(client, loop.time())))
            await asyncio.sleep(gap_s)
        await asyncio.gather(*waits)
        latencies_s.sort()
        return there / N_REQUESTS, latencies_s[int(0.9 * N_REQUESTS)]


@pytest.mark.parametrize("gap_s", [0.5, 2.0])
@pytest.mark.parametrize("make", [LeastLoaded, Cascade, lambda: Cascade(step_model=MODEL)])
def test_a_slow_instance_gets_less(make: Callable[[], Policy], gap_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three takes ten times as long per step: priced by its steps it gets less, and the p90 is lower."""
    share, p90_s = run(serve(make(), gap_s=gap_s))
    monkeypatch.setattr("cascadeinfer.core.pace.SLOW_FROM", float("inf"))
    blind_share, blind_p90_s = run(serve(make(), gap_s=gap_s))
    assert share < blind_share
    assert p90_s < blind_p90_s
