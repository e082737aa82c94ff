"""Order of the virtual clock."""

import pytest

from cascadeinfer.sim.kernel import Kernel, Priority


def test_equal_times_go_by_priority_then_order_then_sequence() -> None:
    """At equal times, steps precede arrivals, lower instance numbers come first, then calls scheduled earlier."""
    kernel = Kernel()
    seen: list[str] = []
    kernel.at(1.0, Priority.ARRIVAL, seen.append, "arrival a")
    kernel.at(1.0, Priority.STEP, seen.append, "step of 2", order=2)
    kernel.at(1.0, Priority.ARRIVAL, seen.append, "arrival b")
    kernel.at(1.0, Priority.STEP, seen.append, "step of 1", order=1)
    kernel.at(0.5, Priority.TIMER, seen.append, "earlier")
    while kernel.next_s() is not None:
        kernel.step()
    assert seen == ["earlier", "step of 1", "step of 2", "arrival a", "arrival b"]
    assert kernel.now_s == 1.0
    assert kernel.events == 5


def test_arguments_are_never_compared() -> None:
    """Two actions of equal rank at one moment need no order among their arguments."""
    kernel = Kernel()
    seen: list[object] = []
    for argument in ({}, {}):
        kernel.at(1.0, Priority.MESSAGE, seen.append, argument)
    kernel.step()
    kernel.step()
    assert len(seen) == 2


def test_the_past_is_closed() -> None:
    """Nothing can be scheduled before now."""
    kernel = Kernel()
    kernel.at(2.0, Priority.TIMER, lambda _: None, None)
    kernel.step()
    with pytest.raises(AssertionError, match="before now"):
        kernel.at(1.0, Priority.TIMER, lambda _: None, None)


def test_steps_of_higher_instances_have_not_happened_while_a_lower_one_steps() -> None:
    """Within the step of instance 1, steps that end now on 0 and 1 have ended, on 2 not yet; afterwards all have."""
    kernel = Kernel()
    seen: list[tuple[bool, ...]] = []

    def look(_: object) -> None:
        seen.append(tuple(kernel.settled_s(number) == kernel.now_s for number in range(3)))

    kernel.at(1.0, Priority.STEP, look, None, order=1)
    kernel.at(1.0, Priority.ARRIVAL, look, None)
    kernel.step()
    kernel.step()
    assert seen == [(True, True, False), (True, True, True)]
