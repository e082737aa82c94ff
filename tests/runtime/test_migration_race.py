"""The race in docs/migration.md: the target dies after the source's cut, before anyone has heard of the cut."""

from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.events import InstanceLost
from cascadeinfer.core.migration import Happening, State
from support.virtual_time import virtual_time


@virtual_time
async def test_the_target_dies_between_the_cut_and_the_news_of_it() -> None:
    """The source takes the request back under a new attempt id, its pin is released, and the client misses no token."""
    policy = ScriptedPolicy({"r": "a"})
    async with Cluster(policy, "abc") as cluster:
        client = await cluster.submit("r", 95, 60)
        await client.until_tokens(5)
        source, migrator = cluster["a"], cluster.runtime._migrator
        undone: list[bool] = []
        undo_cut = source.undo_cut

        async def heard_undo_cut(engine_request_id: str) -> bool:
            undone.append(await undo_cut(engine_request_id))
            return undone[-1]

        source.undo_cut = heard_undo_cut  # type: ignore[method-assign]
        source.hold_outputs()
        cluster.move("r", "b")
        (record,) = migrator._records.values()
        migration = record.migration
        assert migration.state is State.ASKING  # 1
        await cluster.until(lambda: bool(source.core.pins), "the cut has taken effect")
        assert migration.state is State.CUTTING  # 2, 3
        assert cluster["b"].core.reservations

        cluster["b"].kill()
        await cluster.until(lambda: migration.state is State.WITHDRAWING, "the front end knows of the death")  # 4
        await cluster.until(lambda: bool(undone), "the source has answered")
        assert undone == [False]
        assert migration.state is State.WITHDRAWING  # 5

        seen = len(client.token_ids)
        source.pause()
        source.release_outputs()
        await cluster.until(lambda: migration.state is State.RETURNING, "the news of the cut has come")  # 6
        assert len(client.token_ids) > seen
        await cluster.until(lambda: not source.core.pins and bool(source.core.waiting), "the source takes it back")  # 7
        assert [sequence.engine_request_id for sequence in source.core.waiting] == ["r~1"]

        source.unpause()
        await client.until_end()  # 8, and the client checks every token
        await cluster.all_up()
    assert migration.story == [
        State.ASKING.value,
        f"({Happening.ROOM_GRANTED.value})",
        State.CUTTING.value,
        f"({Happening.TARGET_LOST.value})",
        State.WITHDRAWING.value,
        f"({Happening.CUT_DONE.value})",
        State.RETURNING.value,
        f"({Happening.FIRST_TOKEN.value})",
        State.STAYED.value,
    ]
    assert (State.WITHDRAWING, Happening.FIRST_TOKEN) in cluster.pairs
    ended, lost = policy.ended_migrations()[0], next(e for e in policy.events if isinstance(e, InstanceLost))
    assert (ended.outcome, ended.detail) == ("stayed", "target_lost")
    assert (lost.instance_id, lost.orphan_ids) == ("b", ())
    assert policy.events.index(lost) < policy.events.index(ended)
