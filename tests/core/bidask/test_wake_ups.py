"""Which agent is woken next: each agent at its earliest requested time, in order of time."""

from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.bidask.rounds import NEVER
from cascadeinfer.core.bidask.wake_ups import WakeUps


def test_the_earliest_wish_of_an_agent_counts() -> None:
    """A later request changes nothing, an earlier one replaces it; each agent is woken once."""
    wakes = WakeUps()
    wakes.at("a", 3.0)
    wakes.at("a", 5.0)
    wakes.at("b", 4.0)
    wakes.at("a", 2.0)
    assert wakes.next_s() == 2.0
    assert wakes.take_due(1.9) is None
    assert [wakes.take_due(9.0) for _ in range(3)] == ["a", "b", None]
    assert wakes.next_s() is None


def test_a_woken_agent_may_wish_again() -> None:
    """Even for the same moment, which is then due again."""
    wakes = WakeUps()
    wakes.at("a", 1.0)
    assert wakes.take_due(1.0) == "a"
    wakes.at("a", 1.0)
    assert wakes.take_due(1.0) == "a"
    assert wakes.take_due(1.0) is None


def test_never_and_the_gone_are_not_woken() -> None:
    """A request for never is ignored, and the agent of an instance that is gone is not woken."""
    wakes = WakeUps()
    wakes.at("a", NEVER)
    wakes.at("b", 1.0)
    wakes.forget("b")
    wakes.forget("c")
    assert wakes.next_s() is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 9.0)), max_size=30))
def test_wake_ups_are_the_least_wish_of_each(wishes: list[tuple[str, float]]) -> None:
    """The wake-ups are the minimum of each agent's requests, sorted."""
    wakes = WakeUps()
    for instance_id, wake_s in wishes:
        wakes.at(instance_id, wake_s)
    least = {instance_id: min(s for i, s in wishes if i == instance_id) for instance_id, _ in wishes}
    woken = []
    while (instance_id := wakes.take_due(9.0)) is not None:
        woken.append(instance_id)
    assert woken == sorted(least, key=lambda i: (least[i], i))
