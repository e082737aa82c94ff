"""Where a request has been: kept for headers and spans, and readable after its end."""

from runtime_cluster import Cluster, ScriptedPolicy

from support.virtual_time import virtual_time


@virtual_time
async def test_a_move_is_in_the_journey() -> None:
    """Two stays, the second with its reason, each ended; one move."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        client = await cluster.submit("r", 50, 200)
        journey = cluster.runtime.journey_of("r")
        assert journey is not None
        await client.until_tokens(5)
        assert [(v.instance_id, v.how, v.reason, v.ended_s) for v in journey.visits] == [("a", "dispatched", "", None)]
        cluster.move("r", "b")
        await client.until_end()
        assert cluster.runtime.journey_of("r") is None
    first, second = journey.visits
    assert (second.instance_id, second.how) == ("b", "moved")
    assert second.reason
    assert journey.moves == 1
    assert first.ended_s is not None
    assert second.ended_s is not None
    assert first.began_s <= first.ended_s <= second.began_s <= second.ended_s


@virtual_time
async def test_a_death_is_in_the_journey() -> None:
    """The request is dispatched again, which counts as a move if it goes elsewhere."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        client = await cluster.submit("r", 50, 60)
        journey = cluster.runtime.journey_of("r")
        assert journey is not None
        await client.until_tokens(5)
        cluster["a"].kill()
        await client.until_end()
        await cluster.all_up()
    assert [visit.how for visit in journey.visits] == ["dispatched", "dispatched again"]
    assert journey.moves == (journey.visits[1].instance_id != "a")
