"""Two deaths point at one request: who is held back, who is ended, and that nobody waits for ever."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.quarantine import Quarantine


def died_with(quarantine: Quarantine, instance_id: str, *request_ids: str) -> str | None:
    """An instance dies on which these ran."""
    for request_id in request_ids:
        if not quarantine.is_held(request_id):
            quarantine.leave(request_id)
    return quarantine.die(instance_id, request_ids)


def test_a_request_without_a_death_goes_anywhere() -> None:
    """Nothing is noted of it."""
    quarantine = Quarantine()
    assert quarantine.may_enter("a", "0")
    assert not quarantine.is_suspected("a")
    assert quarantine.leave("a") is None
    assert quarantine.prove("a") is None


def test_suspected_ones_enter_one_at_a_time() -> None:
    """First come, first served; each that proves itself lets the next one in; the last one leaves nothing behind."""
    quarantine = Quarantine()
    assert quarantine.die("0", "abc") is None
    assert quarantine.may_enter("a", "1")
    assert not quarantine.may_enter("b", "1")
    assert quarantine.may_enter("c", "2")
    assert quarantine.is_held("b")
    assert quarantine.may_enter("new", "1")
    assert quarantine.prove("a") == "b"
    assert not quarantine.is_suspected("a")
    assert quarantine.prove("b") is None
    assert quarantine.may_enter("d", "1")


def test_the_second_death_in_isolation_names_the_culprit() -> None:
    """Whoever ran beside it has its first death; one that was held back has none more."""
    quarantine = Quarantine()
    quarantine.die("0", ["poison", "b"])
    assert quarantine.may_enter("poison", "1")
    assert not quarantine.may_enter("b", "1")
    assert quarantine.may_enter("innocent", "1")
    assert quarantine.die("1", ["poison", "b", "innocent"]) == "poison"
    assert quarantine.suspicions["b"].deaths == 1
    assert quarantine.suspicions["innocent"].deaths == 1
    assert quarantine.is_suspected("innocent")
    assert not quarantine.is_held("b")


def test_one_that_proved_itself_is_named_when_nobody_else_can_be() -> None:
    """It is the only one that was there both times."""
    quarantine = Quarantine()
    quarantine.die("0", ["poison", "b"])
    quarantine.may_enter("poison", "1")
    quarantine.prove("poison")
    assert quarantine.die("1", ["poison", "c", "d"]) == "poison"


def test_two_that_were_there_both_times_are_told_apart_by_the_third() -> None:
    """None is ended for another's fault; until they end, neither proves itself by a token."""
    quarantine = Quarantine()
    quarantine.die("0", ["poison", "b"])
    for request_id in ("poison", "b"):
        quarantine.may_enter(request_id, "1")
        quarantine.prove(request_id)
    assert quarantine.die("1", ["poison", "b"]) is None
    assert quarantine.may_enter("b", "2")
    assert quarantine.prove("b") is None
    assert quarantine.is_suspected("b")
    assert not quarantine.may_enter("poison", "2")
    assert quarantine.leave("b") == "poison"
    assert quarantine.die("2", ["poison"]) == "poison"


def test_leaving_lets_the_next_one_in() -> None:
    """Also when one that was held back leaves before its turn."""
    quarantine = Quarantine()
    quarantine.die("0", "abc")
    assert [quarantine.may_enter(request_id, "1") for request_id in "abc"] == [True, False, False]
    assert quarantine.leave("b") is None
    assert quarantine.leave("a") == "c"


class World:
    """Requests, some of them poison, on instances that die of poison and of nothing at all."""

    def __init__(self, seed: int, n_poison: int, n_innocent: int, n_random_kills: int) -> None:
        self.rng = Random(seed)
        self.quarantine = Quarantine()
        self.poison = {f"p{i}": self.rng.choice(["at once", "later"]) for i in range(n_poison)}
        self.left = {**dict.fromkeys(self.poison, 9), **{f"i{i}": self.rng.randrange(1, 9) for i in range(n_innocent)}}
        self.place: dict[str, str] = {}
        self.inside: set[str] = set()
        self.tokens_here: dict[str, int] = {}
        self.deaths: dict[str, int] = dict.fromkeys(self.left, 0)
        self.ended: list[str] = []
        self.kills = n_random_kills

    def enter(self, request_id: str) -> None:
        """Sent to an engine."""
        self.inside.add(request_id)
        self.tokens_here[request_id] = 0

    def put(self, request_id: str) -> None:
        """A policy places it, anywhere."""
        self.place[request_id] = self.rng.choice("01")
        if self.quarantine.may_enter(request_id, self.place[request_id]):
            self.enter(request_id)

    def let_in(self, request_id: str | None) -> None:
        """What the quarantine names is sent."""
        if request_id is not None:
            assert request_id not in self.inside
            self.enter(request_id)

    def end(self, request_id: str) -> None:
        """It is over."""
        self.inside.discard(request_id)
        del self.left[request_id]
        if self.place.pop(request_id, None) is not None:
            self.let_in(self.quarantine.leave(request_id))
        self.quarantine.forget(request_id)

    def die(self, instance_id: str) -> None:
        """An instance dies with what is in its engine; the others are placed anew."""
        there = [request_id for request_id, place in self.place.items() if place == instance_id]
        for request_id in there:
            self.deaths[request_id] += request_id in self.inside
        culprit = self.quarantine.die(instance_id, there)
        for request_id in there:
            self.inside.discard(request_id)
            del self.place[request_id]
        if culprit is not None:
            self.ended.append(culprit)
            self.end(culprit)
        for request_id in there:
            if request_id != culprit:
                self.put(request_id)

    def step(self) -> None:
        """Each instance steps once."""
        for instance_id in "01":
            here = sorted(r for r in self.inside if self.place[r] == instance_id)
            suspected = [r for r in here if self.quarantine.is_suspected(r)]
            assert len(suspected) <= 1, "two suspected requests in one engine"
            if any(self.poison.get(r) == "at once" or (r in self.poison and self.tokens_here[r] >= 2) for r in here):
                self.die(instance_id)
                continue
            if self.kills and here and self.rng.random() < 0.2:
                self.kills -= 1
                self.die(instance_id)
                continue
            for request_id in here:
                self.tokens_here[request_id] += 1
                self.let_in(self.quarantine.prove(request_id))
                self.left[request_id] -= 1
                if not self.left[request_id]:
                    self.end(request_id)


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 8), st.integers(0, 3))
def test_poison_is_found_and_nobody_waits_for_ever(seed: int, n_poison: int, n_innocent: int, n_kills: int) -> None:
    """All ends; poison costs three instances at most; without other deaths no innocent is ended, and with them only after two."""
    world = World(seed, n_poison, n_innocent, n_kills)
    for request_id in list(world.left):
        world.put(request_id)
    for _ in range(400):
        if not world.left:
            break
        world.step()
    assert not world.left
    assert set(world.poison) <= set(world.ended)
    innocents = [request_id for request_id in world.ended if request_id not in world.poison]
    assert all(world.deaths[request_id] >= 2 for request_id in world.ended)
    if n_kills == 0 and n_poison <= 1:
        assert not innocents
        assert all(world.deaths[request_id] <= 3 for request_id in world.poison)
    assert not world.quarantine.suspicions


@pytest.mark.parametrize("n_requests", [1, 30])
def test_an_ordinary_death_costs_little(n_requests: int) -> None:
    """However many there were, all are through after as many steps as there are, each step one more on each instance."""
    quarantine = Quarantine()
    names = [f"r{i}" for i in range(n_requests)]
    quarantine.die("0", names)
    waiting = [name for i, name in enumerate(names) if not quarantine.may_enter(name, "12"[i % 2])]
    inside = [name for name in names if name not in waiting]
    steps = 0
    while inside:
        steps += 1
        inside = [next_one for name in inside if (next_one := quarantine.prove(name)) is not None]
    assert steps == -(-n_requests // 2)
    assert not any(quarantine.is_suspected(name) for name in names)
