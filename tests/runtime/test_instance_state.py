"""The instance state table is complete and has no dead ends; what a state allows agrees with its transitions."""

from collections import deque

import pytest

from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.runtime.instance_state import (
    ALLOWED,
    FIRST,
    IGNORED,
    PHASES,
    REMEMBERED,
    SILENT,
    TRANSITIONS,
    Deed,
    Happening,
    InstanceLife,
    Passage,
    State,
)

IN_USE = {state for state, deeds in ALLOWED.items() if Deed.RUN in deeds}


def life_in(state: State) -> InstanceLife:
    """An instance life in this state."""
    life = InstanceLife("7")
    life.state = state
    return life


@pytest.mark.parametrize("happening", Happening)
@pytest.mark.parametrize("state", State)
def test_each_pair_is_followed_ignored_or_refused(state: State, happening: Happening) -> None:
    """A listed pair is a transition, an ignored pair changes nothing, and any other raises with the history."""
    life = life_in(state)
    life.history.append(Passage(Happening.START, state, 1.5, "because"))
    before = list(life.history)
    if (state, happening) in TRANSITIONS:
        assert life.happen(happening, 2.0, "so it is")
        assert life.state is TRANSITIONS[state, happening]
        assert list(life.history) == [*before, Passage(happening, life.state, 2.0, "so it is")]
        return
    if (state, happening) in IGNORED:
        assert not life.happen(happening, 2.0)
    else:
        with pytest.raises(InvalidTransition, match=r"instance 7: .*\(start at 1\.500 s: because\)") as raised:
            life.happen(happening, 2.0)
        assert (raised.value.state, raised.value.event) == (state.value, happening.value)
        assert raised.value.story == ("added", "(start at 1.500 s: because)", state.value)
    assert life.state is state
    assert list(life.history) == before


def test_nothing_is_both_followed_and_ignored() -> None:
    """No pair is in both tables, and nothing leaves the last state."""
    assert not TRANSITIONS.keys() & IGNORED
    assert not [key for key in TRANSITIONS if key[0] is State.GONE]


def test_every_state_is_reachable_and_can_end() -> None:
    """Each state can be reached from the first, and each reaches the last."""
    after: dict[State, set[State]] = {state: set() for state in State}
    for (state, _), following in TRANSITIONS.items():
        after[state].add(following)
    assert reach(after, State.ADDED) == set(State)
    for state in State:
        assert State.GONE in reach(after, state)


def reach(after: dict[State, set[State]], start: State) -> set[State]:
    """All states reachable from `start`, itself included."""
    seen, todo = {start}, deque([start])
    while todo:
        for state in after[todo.popleft()] - seen:
            seen.add(state)
            todo.append(state)
    return seen


def test_what_is_allowed_leads_somewhere() -> None:
    """An act is allowed in exactly the states in which the table provides for it."""
    for deed, happening in (
        (Deed.JOIN, Happening.JOINED),
        (Deed.BE_DRAINED, Happening.DRAIN),
        (Deed.BE_REMOVED, Happening.REMOVED),
    ):
        assert {s for s in State if deed in ALLOWED[s]} == {s for s in State if (s, happening) in TRANSITIONS}, deed
    restarts = {state for state, happening in TRANSITIONS if happening is Happening.START}
    assert {s for s in State if Deed.BE_RESTARTED in ALLOWED[s]} == restarts - FIRST


def test_what_is_in_use_can_die() -> None:
    """Exactly the states that are polled for load (in use or joining) can die, and each of them can be condemned."""
    for state in State:
        asked = Deed.BE_ASKED in ALLOWED[state]
        assert asked == (state in IN_USE or Deed.JOIN in ALLOWED[state])
        assert asked == ((state, Happening.DIED) in TRANSITIONS)
        if asked:
            assert (state, Happening.CONDEMNED) in TRANSITIONS.keys() | IGNORED
        if state in IN_USE:
            for happening in (Happening.SUSPECTED, Happening.TRUSTED):
                assert (state, happening) in TRANSITIONS.keys() | IGNORED or state in {State.UP, State.DRAINING}
    assert SILENT < IN_USE
    assert all(ALLOWED[state] >= {Deed.RUN} for state in State if {Deed.TAKE, Deed.TAKE_IN_NEED} & ALLOWED[state])
    assert all(Deed.TAKE_IN_NEED in ALLOWED[state] for state in State if Deed.TAKE in ALLOWED[state])


def test_what_drains_never_comes_back() -> None:
    """From a state that operators see as draining, only such states and the last one follow."""
    after: dict[State, set[State]] = {state: set() for state in State}
    for (state, _), following in TRANSITIONS.items():
        after[state].add(following)
    assert PHASES.keys() == set(State)
    for state in State:
        if PHASES[state] == "draining":
            assert {PHASES[s] for s in reach(after, state)} <= {"draining", "gone"}


def test_the_history_is_bounded() -> None:
    """Only the most recent passages are kept, in errors too."""
    life = life_in(State.UP)
    for number in range(REMEMBERED):
        life.happen(Happening.SUSPECTED, number)
        life.happen(Happening.TRUSTED, number + 0.5)
    assert len(life.history) == REMEMBERED
    assert life.history[-1] == Passage(Happening.TRUSTED, State.UP, REMEMBERED - 0.5)
    assert len(life.story()) == 2 * REMEMBERED
