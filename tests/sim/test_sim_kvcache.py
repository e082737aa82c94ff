"""Block accounting: golden cases, and conservation under any sequence of operations."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cascadeinfer.sim.kvcache import KvCache


def test_released_units_stay_until_blocks_are_needed() -> None:
    """An unused unit counts as free, is found again, and is evicted, oldest first, when plain blocks run out."""
    kv = KvCache(blocks=6, blocks_per_unit=2)
    kv.take(4)
    assert kv.publish(11)
    assert kv.publish(12)
    kv.release([11, 12])
    assert kv.free_blocks == 6
    assert kv.hits([11, 12, 13], 3) == (2, 2)
    kv.take(3)
    assert kv.hits([11, 12], 2) == (1, 1), "12 is the prompt's end, so it went first"
    kv.take(2)
    assert kv.hits([11], 1) == (0, 0)
    assert kv.free_blocks == 1


def test_a_shared_unit_is_counted_once() -> None:
    """Two users of a unit hold its blocks once, and it is free only when both are gone."""
    kv = KvCache(blocks=4, blocks_per_unit=2)
    kv.take(2)
    assert kv.publish(5)
    kv.hold([5])
    assert kv.free_blocks == 2
    kv.release([5])
    assert kv.free_blocks == 2
    kv.release([5])
    assert kv.free_blocks == 4


def test_a_hash_that_is_here_is_not_published_twice() -> None:
    """A request that computes a unit already present keeps private blocks."""
    kv = KvCache(blocks=8, blocks_per_unit=2)
    kv.take(4)
    assert kv.publish(5)
    assert not kv.publish(5)


def test_hits_stop_at_the_first_gap_and_at_the_limit() -> None:
    """A prefix is shared from its start; the last unit of a prompt that would be wholly cached must be computed."""
    kv = KvCache(blocks=8, blocks_per_unit=1)
    kv.take(3)
    for unit in (1, 2, 4):
        kv.publish(unit)
    assert kv.hits([1, 2, 3, 4], 4) == (2, 0)
    assert kv.hits([1, 2], 1) == (1, 0)


class KvCacheMachine(RuleBasedStateMachine):
    """Requests that come, share and go, with a record of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KvCache(blocks=24, blocks_per_unit=2)
        self.holders: list[tuple[int, list[int]]] = []  # private blocks, units

    @rule(units=st.lists(st.integers(0, 5), max_size=3, unique=True), extra=st.integers(0, 4))
    def admit(self, units: list[int], extra: int) -> None:
        """Hold the cached units, compute the rest and publish them."""
        found, idle = self.kv.hits(units, len(units))
        new = 2 * (len(units) - found) + extra
        if new > self.kv.free_blocks - 2 * idle:
            return
        self.kv.hold(units[:found])
        self.kv.take(new)
        held = list(units[:found])
        for unit in units[found:]:
            if self.kv.publish(unit):
                held.append(unit)
                new -= 2
        self.holders.append((new, held))

    @precondition(lambda self: bool(self.holders))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Free everything one holder has."""
        private, units = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.kv.give(private)
        self.kv.release(units)

    @invariant()
    def blocks_add_up(self) -> None:
        """Private, shared, cached and free blocks add up to all, and the users of units match the record."""
        private = sum(blocks for blocks, _ in self.holders)
        users = Counter(unit for _, units in self.holders for unit in units)
        assert users == Counter(self.kv.used_by)
        assert not set(self.kv.cached) & set(self.kv.used_by)
        assert private + 2 * len(users) + 2 * len(self.kv.cached) + self.kv.plain_free == 24
        assert self.kv.plain_free >= 0


KvCacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestKvCache = KvCacheMachine.TestCase
