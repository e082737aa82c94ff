"""The two policies of SGLang's gateway beside its cache-aware one: `bucket` and `power_of_two`."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.policies.bucket import Bucket, equal_shares
from cascadeinfer.core.policies.power_of_two import PowerOfTwo
from support.policy_world import LARGE, World

# --- bucket ----------------------------------------------------------------------------------------------------------


def buckets(**options: float) -> World:
    """Three instances; nothing is out of balance unless the options say so."""
    world = World(Bucket(**({"balance_abs": 10**9} | options)), LARGE)  # type: ignore[arg-type]
    world.join("i0", "i1", "i2")
    return world


def places(world: World, prompts: list[int], prefix: str = "p") -> list[str | None]:
    """Where requests with these prompts go, one after the other."""
    names = [f"{prefix}{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        world.arrive(name, prompt)
    return [world.requests[name].instance_id for name in names]


@pytest.mark.parametrize(
    ("prompts", "n", "ends"),
    [
        ([33, 34, 34], 3, [33, 67]),  # these two are the source's own examples
        ([5, 10, 15, 20, 24, 26], 3, [20, 26]),
        ([7], 1, []),
        ([100], 3, [100, 134]),
        ([1], 3, [0, 1]),
    ],
)
def test_ranges_have_equal_shares(prompts: list[int], n: int, ends: list[int]) -> None:
    """A range ends at the prompt with which it has its share; without prompts left it is as wide as a share."""
    assert equal_shares(prompts, n) == ends


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 20))
def test_ranges_increase(prompts: list[int], n: int) -> None:
    """There is a range per instance, and each begins after the one before it."""
    ends = equal_shares(prompts, n)
    assert len(ends) == n - 1
    assert all(low < high for low, high in pairwise(ends))


def test_first_ranges_divide_a_thousand_tokens() -> None:
    """Before any adjustment, three instances take prompts below 341, below 682, and the rest."""
    assert places(buckets(), [1, 340, 341, 681, 682, 100_000]) == ["i0", "i0", "i1", "i1", "i2", "i2"]


def test_ranges_follow_the_prompts() -> None:
    """After the interval, ranges carry equal shares of its prompts; before it, nothing has changed."""
    world = buckets()
    assert places(world, [5, 10, 15, 20, 24, 26]) == ["i0"] * 6
    world.advance(4.9)
    assert places(world, [26], "early") == ["i0"]
    world.advance(0.2)
    assert places(world, [20, 21, 26, 27, 9000], "late") == ["i0", "i1", "i1", "i2", "i2"]


def test_ranges_stay_while_the_share_does() -> None:
    """Other prompts of nearly the same total change nothing; three times the total does."""
    world = buckets()
    places(world, [10, 20, 30])
    world.advance(5.1)
    assert places(world, [30, 31, 32], "a") == ["i1", "i2", "i2"]
    world.advance(5.1)
    assert places(world, [20, 21], "b") == ["i0", "i1"]
    places(world, [600, 600], "many")
    world.advance(5.1)
    assert places(world, [300], "c") == ["i0"]


def test_out_of_balance_the_least_load_wins() -> None:
    """While loads differ by more than 50 tokens, the instance with the least takes the next; then ranges decide."""
    world = buckets(balance_abs=50, balance_rel=1.5)
    assert places(world, [100, 3, 100, 100, 1, 60]) == ["i0", "i1", "i2", "i1", "i0", "i0"]


def test_loads_are_forgotten() -> None:
    """What was sent more than an interval ago no longer counts."""
    world = buckets(balance_abs=50, interval_s=2.0)
    places(world, [100])
    world.advance(2.1)
    places(world, [40], "b")
    policy = world.policy
    assert isinstance(policy, Bucket)
    assert sum(policy._loads.values()) == 40


def test_ranges_are_for_the_instances_there_are() -> None:
    """When an instance drains, the others share the lengths; when one joins, it gets a range at once."""
    world = buckets()
    world.drain("i1")
    assert places(world, [511, 512]) == ["i0", "i2"]
    world.join("i3", "i4")
    assert {*places(world, [1, 600, 800, 9000], "more")} == {"i0", "i2", "i3", "i4"}


@pytest.mark.parametrize("options", [{"interval_s": 0.0}, {"interval_s": float("nan")}, {"first_tokens": 0}])
def test_bucket_refuses_nonsense(options: dict[str, float]) -> None:
    """An interval or a width that is not positive is refused, by name."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        Bucket(**options)  # type: ignore[arg-type]


# --- power_of_two ----------------------------------------------------------------------------------------------------


def test_the_fullest_is_never_chosen() -> None:
    """Of two different instances the one with fewer tokens takes the request, so the fullest of three takes none."""
    world = World(PowerOfTwo(seed=3), LARGE)
    world.join("i0")
    world.arrive("long", 50_000)
    world.join("i1", "i2")
    taken = Counter(places(world, [10] * 200))
    assert taken["i0"] == 0
    assert min(taken["i1"], taken["i2"]) > 50


def test_of_two_the_emptier_takes_all() -> None:
    """With two instances both are drawn every time."""
    world = World(PowerOfTwo(), LARGE)
    world.join("i0", "i1")
    assert places(world, [100, 10, 10, 10, 90]).count("i0") in {1, 4}
    loads = {i: sum(r.tokens for r in world.on(i)) for i in ("i0", "i1")}
    assert sorted(loads.values()) == [100, 120]


def test_draws_have_a_seed() -> None:
    """The same seed chooses the same instances, another one others."""
    chosen = []
    for seed in (1, 1, 2):
        world = World(PowerOfTwo(seed=seed), LARGE)
        world.join(*(f"i{n}" for n in range(8)))
        chosen.append(places(world, [10] * 40))
    assert chosen[0] == chosen[1] != chosen[2]


def test_two_choices_even_out_better_than_one() -> None:
    """Of 1,000 equal requests on 10 instances the fullest has hardly more than 100; with one draw it has about 116."""
    world = World(PowerOfTwo(), LARGE)
    world.join(*(f"i{n}" for n in range(10)))
    taken = Counter(places(world, [10] * 1000))
    assert max(taken.values()) <= 104
