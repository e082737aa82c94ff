"""The cascade's prefix-cache affinity: a conversation stays with its KV cache as long as that is worth it."""

from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.placing.prefix_index import PrefixIndex
from cascadeinfer.core.policies.cascade import Cascade
from support.policy_world import LARGE, World

MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=6e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
LAYOUT = StageLayout.from_boundaries((2000,), (("a", "b"), ("c", "d")))
SHORT = tuple(range(10))
"""Hashes of a prompt of 1,280 tokens."""
LONG = tuple(range(80))
"""Hashes of a prompt of 10,240 tokens that begins with the same ones."""


def world_of(layout: StageLayout | None = None, **options: bool) -> World:
    """Four instances; one stage unless said otherwise."""
    world = World(Cascade(step_model=MODEL, layout=layout, replan=False, refine=False, **options), LARGE)
    world.join("a", "b", "c", "d")
    return world


def place(world: World, request_id: str, prompt: int, hashes: tuple[int, ...] = ()) -> str | None:
    """Place a request; returns its instance."""
    world.arrive(request_id, prompt, prefix_hashes=hashes)
    return world.requests[request_id].instance_id


def test_a_conversation_returns_to_its_cache() -> None:
    """With affinity, the next turn goes where the first went; without, to the idle instance that is first in order."""
    for affinity, expected in ((True, "b"), (False, "a")):
        world = world_of(affinity=affinity)
        place(world, "other", 9000)
        assert place(world, "turn1", 10_240, LONG) == "b"
        world.finish("other")
        world.finish("turn1")
        assert place(world, "turn2", 10_368, (*LONG, 1000)) == expected


def test_strangers_go_to_the_cheapest() -> None:
    """Hashes that match nothing change nothing."""
    world = world_of()
    assert place(world, "r0", 10_240, LONG) == "a"
    assert place(world, "r1", 10_240, tuple(range(500, 580))) == "b"
    assert place(world, "r2", 10_240) == "c"


def test_load_outweighs_a_cache() -> None:
    """Requests with the same prefix go to its cache while that is cheap; as they pile up, others take their share."""
    world = world_of()
    places = []
    for n in range(120):
        chosen = place(world, f"r{n}", 10_240, LONG)
        assert chosen is not None
        places.append(chosen)
        world.report(chosen)  # it runs
        world.grow(chosen, 1)
        world.report(chosen)  # its prompt has been computed
    assert places[:2] == ["a"] * 2
    assert set(places) == set("abcd")
    assert max(places.count(name) for name in "abcd") < 60


def test_a_cache_in_another_stage() -> None:
    """A long cached prompt draws a request out of its stage, a short one does not; an idle wrong stage never does."""
    world = world_of(LAYOUT)
    assert place(world, "long", 10_240, LONG) == "c"
    world.finish("long")
    # 1,920 of 1,921 tokens are cached in the wrong stage, which is idle like the right one.
    assert place(world, "again", 1921, LONG[:15]) == "c"
    assert place(world, "new", 1921, tuple(range(900, 915))) == "a"
    for n in range(40):
        place(world, f"busy{n}", 9000)
    assert place(world, "little", 256, LONG[:2]) in {"a", "b"}


def test_a_move_takes_the_cache_along() -> None:
    """After a hand-over, the next turn may go to the target; a lost instance is forgotten."""
    world = world_of()
    assert place(world, "turn1", 10_240, LONG) == "a"
    world.drain("a")
    for _ in range(5):
        world.grow("a", 1)
        world.report("a")
        world.deliver_all()
        world.advance(0.1)
    [move] = world.moves.values()
    world.end(move.migration_id, MigrationOutcome.MOVED)
    world.finish("turn1")
    assert place(world, "turn2", 10_240, LONG) == move.target_id
    world.finish("turn2")
    world.lose(move.target_id)
    assert place(world, "turn3", 10_240, LONG) in set("bcd") - {move.target_id}


def test_a_full_instance_is_no_candidate() -> None:
    """A cache without room for the request does not count."""
    world = world_of()
    assert place(world, "turn1", 10_240, LONG) == "a"
    world.finish("turn1")
    for n in range(39):
        world.policy.view.instances["a"].add(f"ghost{n}", 10_240, waits=False)  # type: ignore[attr-defined]
    assert place(world, "turn2", 10_240, LONG) == "b"


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=5), st.sampled_from("abc")), max_size=20),
    st.lists(st.integers(0, 3), max_size=5),
)
def test_matches_per_instance(prompts: list[tuple[list[int], str]], asked: list[int]) -> None:
    """Per instance, the longest prefix of any prompt that went there, as a search over all prompts finds it."""
    index = PrefixIndex(1000)
    path = lambda blocks: tuple(hash(tuple(blocks[: n + 1])) for n in range(len(blocks)))  # noqa: E731
    for blocks, instance_id in prompts:
        index.add(path(blocks), instance_id)
    expected: dict[str, int] = {}
    for blocks, instance_id in prompts:
        common = 0
        while common < min(len(blocks), len(asked)) and blocks[common] == asked[common]:
            common += 1
        if common:
            expected[instance_id] = max(common, expected.get(instance_id, 0))
    assert index.matches(path(asked)) == expected
