"""What the operator's page is shown: pictures of a live runtime, what has ended, the stories of requests."""

import asyncio
from typing import Any

import pytest
from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import MigrationReason, PublishLayout, StartMigration
from cascadeinfer.core.events import MigrationOutcome, PinReason
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policy import PlansAhead
from cascadeinfer.runtime.ledger import PAUSES, RECENT_MOVES, Ledger
from cascadeinfer.runtime.picture import MAX_OLDEST, RECENT_S
from cascadeinfer.runtime.stories import MAX_STEPS
from support.pictures import TWO, record
from support.virtual_time import virtual_time

LAYOUT = StageLayout.from_boundaries((40,), (("a",), ("b", "c")))


def lane(picture: dict[str, Any], instance_id: str) -> dict[str, Any]:
    """One instance of a picture."""
    return next(instance for instance in picture["instances"] if instance["id"] == instance_id)


@virtual_time
async def test_a_picture_has_the_lengths_of_every_lane() -> None:
    """Each instance shows its running requests by length, its stage and its load; the oldest come with their ages."""
    async with Cluster(ScriptedPolicy({"short": "a", "long": "b"})) as cluster:
        cluster.do(PublishLayout("test", LAYOUT, "planned by hand"))
        short = await cluster.submit("short", 10, 200, pin_reason=PinReason.LORA)
        await asyncio.sleep(0.3)
        long = await cluster.submit("long", 50, 60)
        await long.until_tokens(20)
        await asyncio.sleep(0.15)  # the report
        picture = cluster.runtime.lookout.picture()
        assert [(stage["lo"], stage["hi"], stage["instances"]) for stage in picture["stages"]] == [
            (0, 40, ["a"]), (40, None, ["b", "c"]),
        ]  # fmt: skip
        assert picture["plan"]["why"] == "planned by hand"
        assert picture["plan"]["next"] is None
        assert [lane(picture, name)["running"] for name in "abc"] == [1, 1, 0]
        assert [lane(picture, name)["stage"] for name in "abc"] == [0, 1, 1]
        assert lane(picture, "b")["lengths"] == [pytest.approx(50 + len(long.token_ids), abs=15)]
        assert 0.0 < lane(picture, "b")["kv_usage"] < 1.0
        assert lane(picture, "a")["role"] == "mixed"
        assert [r["id"] for r in picture["requests"]["oldest"]] == ["short", "long"]
        oldest = picture["requests"]["oldest"][0]
        assert (oldest["instance"], oldest["prompt_tokens"], oldest["pinned"]) == ("a", 10, "lora")
        assert oldest["tokens"] == 10 + len(short.token_ids)
        assert oldest["age_s"] > picture["requests"]["oldest"][1]["age_s"]
        assert (picture["requests"]["live"], picture["requests"]["unplaced"]) == (2, 0)
        await short.until_end()
        await long.until_end()
        assert cluster.runtime.lookout.picture()["requests"]["ended"] == {"finished": 2}


@virtual_time
async def test_a_picture_shows_a_move_while_it_lasts_and_a_little_longer() -> None:
    """A move is under way, then recent with its outcome and pause, and is counted for good with its percentiles."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        client = await cluster.submit("r", 30, 100)
        await client.until_tokens(5)
        cluster.move("r", "b")
        [moving] = cluster.runtime.lookout.picture()["moves"]["under_way"]
        assert (moving["request"], moving["source"], moving["target"]) == ("r", "a", "b")
        assert moving["tokens"] >= 35
        await cluster.until(lambda: bool(cluster.runtime.ledger.recent), "moved")
        moves = cluster.runtime.lookout.picture()["moves"]
        assert moves["under_way"] == []
        [recent] = moves["recent"]
        assert (recent["outcome"], recent["reason"], recent["seconds_ago"]) == ("moved", "operator", 0.0)
        assert recent["pause_s"] > 0.0
        [ended] = moves["ended"]
        assert (ended["outcome"], ended["reason"], ended["count"]) == ("moved", "operator", 1)
        assert ended["pause_s"] == {"n": 1, **dict.fromkeys(("p50", "p95", "p99"), pytest.approx(recent["pause_s"]))}
        await client.until_end()
        await asyncio.sleep(RECENT_S)
        moves = cluster.runtime.lookout.picture()["moves"]
        assert (moves["recent"], moves["ended"][0]["count"]) == ([], 1)


@virtual_time
async def test_a_picture_shows_what_is_wrong() -> None:
    """A dead instance has its error and its next start, a draining one what is left, a gone one how it went."""
    async with Cluster(ScriptedPolicy({"r": "b"})) as cluster:
        client = await cluster.submit("r", 20, 300)
        await client.until_tokens(3)
        cluster["c"].kill()
        await cluster.until(lambda: lane(cluster.runtime.lookout.picture(), "c")["phase"] == "down", "dead")
        dead = lane(cluster.runtime.lookout.picture(), "c")
        assert not dead["up"]
        assert dead["last_error"]
        assert dead["restart_in_s"] > 0.0
        cluster.runtime.elastic.drain("b", 60.0)
        drain = lane(cluster.runtime.lookout.picture(), "b")["drain"]
        assert drain["requests_at_start"] == 1
        assert drain["time_left_s"] == pytest.approx(60.0)
        await client.until_end()
        await cluster.gone("b")
        picture = cluster.runtime.lookout.picture()
        assert [(gone["id"], gone["how"]) for gone in picture["departed"]] == [("b", "drained")]
        await cluster.all_up()
        assert lane(cluster.runtime.lookout.picture(), "c")["restarts"] == 1


@virtual_time
async def test_a_plan_that_fails_is_shown_with_the_stages_that_stay() -> None:
    """A fault in planning keeps stages and reason, and says what went wrong; the next change clears it."""
    async with Cluster() as cluster:
        cluster.do(PublishLayout("test", LAYOUT, "planned"))
        await asyncio.sleep(3.0)
        cluster.do(PublishLayout("test", LAYOUT, failure="no plan could be made"))
        plan = cluster.runtime.lookout.picture()["plan"]
        assert (plan["why"], plan["failure"]) == ("planned", "no plan could be made")
        assert plan["since_s"] >= 3.0
        cluster.do(PublishLayout("test", LAYOUT, "planned again"))
        plan = cluster.runtime.lookout.picture()["plan"]
        assert (plan["why"], plan["failure"]) == ("planned again", None)
        assert plan["since_s"] >= 3.0  # the stages are the same
        assert cluster.runtime.fleet.gauges().plan_age_s == pytest.approx(plan["since_s"], abs=0.1)
        cluster.do(PublishLayout("test", StageLayout.from_boundaries((50,), (("a",), ("b", "c"))), "planned"))
        assert cluster.runtime.lookout.picture()["plan"]["since_s"] < 1.0


@virtual_time
async def test_the_story_of_a_request() -> None:
    """It tells arrival, dispatch, move and loss in order, with the stages of their time; it ends with the request."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        cluster.do(PublishLayout("test", LAYOUT))
        client = await cluster.submit("r", 30, 200)
        await client.until_tokens(5)
        cluster.move("r", "b")
        await cluster.until(lambda: bool(cluster.runtime.ledger.recent), "moved")
        cluster["b"].kill()
        await client.until_tokens(60)
        story = cluster.runtime.lookout.story("r")
        assert story is not None
        assert (story["id"], story["dropped"]) == ("r", 0)
        texts = [chapter["text"] for chapter in story["chapters"]]
        beginnings = [
            "arrived: 30 prompt tokens, at most 200 more", "dispatched to a (stage 0: 0-40 tokens)",
            "migration move1 begins at 3", "migration move1 is over: moved with its KV cache, now on b (stage 1: 40- ",
            "lost its instance b at", "dispatched to ",
        ]  # fmt: skip
        assert [t[: len(b)] for t, b in zip(texts, beginnings, strict=True)] == beginnings
        ages = [chapter["seconds_ago"] for chapter in story["chapters"]]
        assert ages == sorted(ages, reverse=True)
        await client.until_end()
        assert cluster.runtime.lookout.story("r") is None


@virtual_time
async def test_long_stories_lose_their_middle() -> None:
    """A request that is tried again and again keeps its arrival and its last steps."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        client = await cluster.submit("r", 10, 200)
        for number in range(MAX_STEPS):
            reason = MigrationReason.OPERATOR
            cluster.do(StartMigration("test", f"m{number}", "r", "c", "b", reason))  # it is not on c: stale
        story = cluster.runtime.lookout.story("r")
        assert story is not None
        assert len(story["chapters"]) == MAX_STEPS
        assert story["dropped"] == 2 + 2 * MAX_STEPS - MAX_STEPS
        assert story["chapters"][0]["text"].startswith("arrived")
        assert f"m{MAX_STEPS - 1} is over: stayed" in story["chapters"][-1]["text"]
        await client.until_end()


@virtual_time
async def test_a_picture_is_bounded() -> None:
    """However many requests are live, the picture lists a few."""
    async with Cluster() as cluster:
        clients = [await cluster.submit(f"r{number}", 5, 5) for number in range(3 * MAX_OLDEST)]
        requests = cluster.runtime.lookout.picture()["requests"]
        assert len(requests["oldest"]) == MAX_OLDEST
        assert requests["live"] == 3 * MAX_OLDEST
        for client in clients:
            await client.until_end()


def ended(number: int, outcome: MigrationOutcome = MigrationOutcome.MOVED) -> tuple[Any, Any]:
    """A move with this number, and its end."""
    effect = StartMigration("", f"m{number}", f"r{number}", "a", "b", MigrationReason.REBALANCE)
    return effect, effect.ended(outcome, "")


def test_the_ledger_is_bounded_and_counts_everything() -> None:
    """Moves and pauses beyond the limits are forgotten one by one, and still counted."""
    ledger = Ledger(lambda: 5.0)
    for number in range(2 * RECENT_MOVES):
        ledger.move_ended(*ended(number), 100, 0.001 * number)
    tally = ledger.moves[MigrationOutcome.MOVED, MigrationReason.REBALANCE]
    assert tally.count == 2 * RECENT_MOVES
    assert len(tally.pauses_s) == PAUSES
    assert [move.migration_id for move in ledger.recent][-1] == f"m{2 * RECENT_MOVES - 1}"
    assert len(ledger.recent) == RECENT_MOVES


def test_a_ledger_that_is_asked_tells_each_end_once() -> None:
    """What has ended since the last question, from the first one on; another ledger can enter it."""
    ledger, whole = Ledger(lambda: 5.0), Ledger(lambda: 9.0)
    ledger.request_ended("finished")
    assert ledger.take() == ([], {})
    ledger.request_ended("finished")
    ledger.request_ended("rejected")
    ledger.move_ended(*ended(1, MigrationOutcome.STAYED), 100, None)
    moves, requests = ledger.take()
    assert ledger.take() == ([], {})
    for move in moves:
        whole.enter_move(move)
    whole.enter_requests(requests)
    assert whole.requests == {"finished": 1, "rejected": 1}
    assert [(move.migration_id, move.at_s) for move in whole.recent] == [("m1", 5.0)]
    assert whole.moves[MigrationOutcome.STAYED, MigrationReason.REBALANCE].count == 1


def test_cascade_says_what_its_next_plan_needs() -> None:
    """When it is due, how many requests were seen, and which gain it needs; nothing where it makes no plans."""
    model = StepModel(
        base_s=0.01, per_decode_s=0.0, per_kv_token_s=0.0, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
    )
    policy = Cascade(step_model=model)
    assert isinstance(policy, PlansAhead)
    needs = policy.next_plan()
    assert needs is not None
    assert (needs.due_s, needs.requests, needs.last) == (None, 0.0, "")
    assert needs.needed_requests == PlanSettings().min_requests
    assert needs.needed_gain == PlanSettings().needed_gain(0.0)
    assert Cascade(step_model=model, replan=False).next_plan() is None
    assert not isinstance(ScriptedPolicy(), PlansAhead)


def test_a_recording_says_what_became_of_the_last_plan() -> None:
    """After the first attempt at a plan, the picture says that too few requests had been seen for one."""
    last = record(TWO)[-1]
    assert last["plan"]["next"]["due_s"] is not None
    assert 0.0 < last["plan"]["next"]["requests"] < last["plan"]["next"]["needed_requests"]
