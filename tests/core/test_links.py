"""Links between nodes: known from pulls, far only when clearly slower than the best, and none of it on one node."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.links import FAR_FROM, LEAST_TOKENS, PULLS_KEPT, PULLS_NEEDED, Link, Links

NODES = {"a0": "a", "a1": "a", "b0": "b", "b1": "b"}


def links_of(nodes: dict[str, str]) -> Links:
    """Instances on these nodes, nothing measured."""
    links = Links()
    for instance_id, node in nodes.items():
        links.joined(instance_id, node)
    return links


def measured(links: Links, source: str, target: str, tokens_per_s: float, n: int = PULLS_NEEDED) -> None:
    """So many pulls of a thousand tokens at this rate."""
    for _ in range(n):
        links.pulled(source, target, 1000, 1000 / tokens_per_s)


def test_a_move_over_a_slow_link_takes_longer() -> None:
    """By its tokens at the difference of the two rates; the other direction has not been measured."""
    links = links_of(NODES)
    measured(links, "a0", "a1", 50_000.0)
    assert links.extra_s("a0", "b0", 1000) == 0.0
    measured(links, "a0", "b1", 10_000.0)
    assert links.extra_s("a1", "b0", 1000) == pytest.approx(0.1 - 0.02), "all instances of a node share its links"
    assert links.extra_s("a0", "a1", 1000) == 0.0
    assert links.extra_s("b0", "a0", 1000) == 0.0
    assert links.extra_s("a0", "stranger", 1000) == 0.0
    assert links.known() == [
        Link("a", "a", pytest.approx(50_000.0), PULLS_NEEDED, is_far=False),
        Link("a", "b", pytest.approx(10_000.0), PULLS_NEEDED, is_far=True),
    ]


def test_links_that_differ_little_are_alike() -> None:
    """Below the limit nothing is far: pulls differ anyway."""
    links = links_of(NODES)
    measured(links, "a0", "a1", 10_000.0 * FAR_FROM * 0.99)
    measured(links, "a0", "b0", 10_000.0)
    assert links.extra_s("a0", "b0", 1000) == 0.0


def test_one_pull_is_none_and_old_ones_are_forgotten() -> None:
    """A median over the last ones: a hiccup makes no link far, and a link that has become faster is near again."""
    links = links_of(NODES)
    measured(links, "a0", "a1", 50_000.0, 5)
    measured(links, "a0", "b0", 50_000.0, 5)
    measured(links, "a0", "b0", 1_000.0, 1)
    assert links.extra_s("a0", "b0", 1000) == 0.0
    measured(links, "a0", "b0", 1_000.0, PULLS_KEPT)
    assert links.extra_s("a0", "b0", 1000) > 0.9
    measured(links, "a0", "b0", 50_000.0, PULLS_KEPT)
    assert links.extra_s("a0", "b0", 1000) == 0.0


def test_small_pulls_and_unknown_places_say_nothing() -> None:
    """Neither of the link nor of anything else; an instance that comes back elsewhere is there."""
    links = links_of({**NODES, "x": ""})
    for _ in range(PULLS_KEPT):
        links.pulled("a0", "a1", LEAST_TOKENS - 1, 1.0)
        links.pulled("a0", "a1", 0, 0.0)
        links.pulled("a0", "x", 1000, 1.0)
        links.pulled("x", "a0", 1000, 1.0)
    assert links.known() == []
    assert (links.knows("a0"), links.knows("x")) == (True, False)
    measured(links, "a0", "a1", 50_000.0)
    measured(links, "a0", "b0", 1_000.0)
    links.joined("b0", "a")
    assert links.extra_s("a0", "b0", 1000) == 0.0


def test_with_its_last_instance_a_node_is_forgotten() -> None:
    """A node that comes back may be another machine at the same address."""
    links = links_of(NODES)
    measured(links, "a0", "a1", 50_000.0)
    measured(links, "a0", "b0", 1_000.0)
    links.left("b0")
    assert links.extra_s("a0", "b1", 1000) > 0.9
    links.left("b1")
    links.left("stranger")
    assert [(link.source, link.target) for link in links.known()] == [("a", "a")]
    links.joined("b1", "b")
    assert links.extra_s("a0", "b1", 1000) == 0.0


@given(st.integers(0, 2**32), st.integers(1, 200))
def test_on_one_node_nothing_is_ever_far(seed: int, n: int) -> None:
    """Whatever its pulls took."""
    rng = random.Random(seed)
    names = ["i0", "i1", "i2"]
    links = links_of(dict.fromkeys(names, "here"))
    for _ in range(n):
        links.pulled(rng.choice(names), rng.choice(names), rng.randrange(5000), rng.expovariate(10.0))
    assert not any(links.extra_s(one, other, 10_000) for one in names for other in names)
    assert len(links.known()) <= 1


def test_how_long_a_pull_takes() -> None:
    """As long as moves between these nodes have shown; nothing is known of a pair without any, or of a stranger."""
    links = links_of(NODES)
    assert links.pull_s("a0", "b0", 1000) is None
    measured(links, "a0", "b0", 1_000.0)
    assert links.pull_s("a0", "b1", 500) == pytest.approx(0.5)
    assert links.pull_s("b0", "a0", 500) is None
    assert links.pull_s("a0", "stranger", 500) is None


def test_what_is_copied_ahead_nobody_waits_for() -> None:
    """A far link costs a request the share of its tokens that is pulled after the cut; copies tell the rates."""
    links = links_of(NODES)
    measured(links, "a0", "a1", 50_000.0)
    for _ in range(PULLS_KEPT):
        links.pulled("a0", "b0", 2000, 1.8, 1800)
    assert [link.tokens_per_s for link in links.known()] == pytest.approx([50_000.0, 1_000.0])
    whole_s = 1000 * (1 / 1_000.0 - 1 / 50_000.0)
    assert links.extra_s("a0", "b0", 1000) == pytest.approx(0.1 * whole_s)
    for _ in range(PULLS_KEPT):
        links.pulled("a0", "b0", 2000, 2.0)
    assert links.extra_s("a0", "b0", 1000) == pytest.approx(whole_s)
