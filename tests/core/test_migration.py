"""The migration table: complete, without dead ends, and without leaks of room, pins or attempts on any path."""

import importlib.util
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.migration import IGNORED, OUTCOMES, TRANSITIONS, Action, Happening, Migration, State

FINAL = set(OUTCOMES)
OPEN = [state for state in State if state not in FINAL]
PROTOCOLS = Path(__file__).parents[2] / "docs" / "protocols"


def migration_in(state: State) -> Migration:
    """A migration that is in this state."""
    return Migration("m", "r", "a", "b", 10, state)


def test_final_states_have_outcomes() -> None:
    """The final states and the outcomes correspond one to one; nothing leaves a final state."""
    assert sorted(OUTCOMES.values()) == sorted(MigrationOutcome)
    assert not [key for key in TRANSITIONS if key[0] in FINAL]
    for state in State:
        assert (migration_in(state).outcome is not None) == (state in FINAL)


@pytest.mark.parametrize("state", OPEN)
def test_open_states_take_every_blow(state: State) -> None:
    """A client that leaves and the death of either instance are provided for in every open state."""
    for happening in (Happening.CLIENT_LEFT, Happening.SOURCE_LOST, Happening.TARGET_LOST, Happening.REQUEST_ENDED):
        assert (state, happening) in TRANSITIONS or (state, happening) in IGNORED
    assert TRANSITIONS[state, Happening.CLIENT_LEFT][0] is State.ENDED


def test_nothing_is_both_followed_and_ignored() -> None:
    """No pair is in both tables."""
    assert not TRANSITIONS.keys() & IGNORED


@pytest.mark.parametrize("happening", Happening)
@pytest.mark.parametrize("state", State)
def test_each_pair_is_followed_ignored_or_refused(state: State, happening: Happening) -> None:
    """A pair in the table leads on; an ignored one changes nothing; any other raises and changes nothing."""
    migration = migration_in(state)
    story = list(migration.story)
    key = (state, happening)
    if key in TRANSITIONS:
        following, actions = TRANSITIONS[key]
        assert migration.handle(happening) == actions
        assert migration.state is following
        assert migration.story == [*story, f"({happening.value})", following.value]
    elif key in IGNORED:
        assert migration.handle(happening) == ()
        assert migration.state is state
        assert migration.story == story
    else:
        with pytest.raises(InvalidTransition) as raised:
            migration.handle(happening)
        assert (raised.value.state, raised.value.event) == (state.value, happening.value)
        assert raised.value.story == tuple(story)
        assert migration.state is state
        assert migration.story == story


def test_every_state_is_reachable_and_leads_to_an_end() -> None:
    """Each state can be reached from the first, each open one reaches a final one, and each action is used."""
    after: dict[State, set[State]] = {state: set() for state in State}
    for (state, _), (following, _) in TRANSITIONS.items():
        after[state].add(following)
    assert reach(after, State.ASKING) == set(State)
    for state in OPEN:
        assert reach(after, state) & FINAL
    used = {action for _, actions in TRANSITIONS.values() for action in actions}
    assert used | {Action.ASK_ROOM} == set(Action)  # ASK_ROOM begins each migration


def reach(after: dict[State, set[State]], start: State) -> set[State]:
    """All states that can follow, `start` included."""
    seen, todo = {start}, deque([start])
    while todo:
        for state in after[todo.popleft()] - seen:
            seen.add(state)
            todo.append(state)
    return seen


def test_at_target_follows_the_request() -> None:
    """The request is in the target's hands from the resumption on."""
    assert {state for state in State if migration_in(state).at_target} == {
        State.RESUMING,
        State.RECOMPUTING,
        State.MOVED,
        State.RECOMPUTED,
    }


@dataclass(frozen=True)
class World:
    """
    What there may be outside after a path through the table.

    Attributes:
        room: Whether the target may hold room for the request.
        pin: Whether the source may hold the cut request's blocks.
        at_source: Whether an attempt at the source may live.
        at_target: Whether an attempt at the target may live.
    """

    room: bool = True
    pin: bool = False
    at_source: bool = True
    at_target: bool = False
    target_up: bool = True


HAPPENING_CHANGES: dict[Happening, dict[str, bool]] = {
    Happening.ROOM_REFUSED: {"room": False},
    Happening.TARGET_LOST: {"room": False, "at_target": False, "target_up": False},
    Happening.SOURCE_LOST: {"pin": False, "at_source": False},
    Happening.CUT_DONE: {"at_source": False},
    Happening.CUT_EMPTY: {"at_source": False, "pin": False},
    Happening.CUT_LATE: {"at_source": False},
    Happening.CUT_REFUSED: {"pin": False},
    Happening.CUT_UNDONE: {"pin": False},
}
"""What a happening itself does to the world, before any action, in every state."""
ENDED_AT_SOURCE = {"at_source": False, "pin": False}
STATE_CHANGES: dict[tuple[State, Happening], dict[str, bool]] = {
    (State.ASKING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.CUTTING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.WITHDRAWING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.RETURNING, Happening.REQUEST_ENDED): {"at_source": False},
    (State.RESUMING, Happening.REQUEST_ENDED): {"at_target": False},
    (State.RECOMPUTING, Happening.REQUEST_ENDED): {"at_target": False},
    (State.RESUMING, Happening.FIRST_TOKEN): {"pin": False},  # pulled, which frees the source
}
"""The same where the state matters."""
ACTION_CHANGES: dict[Action, dict[str, bool]] = {
    Action.CUT: {"pin": True},
    Action.RESUME: {"room": False, "at_target": True},
    Action.RECOMPUTE: {"at_target": True},
    Action.TAKE_BACK: {"at_source": True},
    Action.RELEASE_ROOM: {"room": False},
    Action.RELEASE_PIN: {"pin": False},
    Action.ABORT_AT_SOURCE: {"at_source": False},
    Action.ABORT_AT_TARGET: {"at_target": False},
    Action.UNDO_CUT: {},
}


def world_after(world: World, state: State, happening: Happening, actions: tuple[Action, ...]) -> World:
    """The world after one transition."""
    world = replace(world, **HAPPENING_CHANGES.get(happening, {}), **STATE_CHANGES.get((state, happening), {}))
    for action in actions:
        if action in {Action.RESUME, Action.RECOMPUTE, Action.TAKE_BACK}:
            assert not world.at_source, f"two attempts at once: {state}, {happening}"
            assert not world.at_target, f"two attempts at once: {state}, {happening}"
        if action in {Action.RESUME, Action.RECOMPUTE}:
            assert world.target_up, f"the target is down: {state}, {happening}"
        world = replace(world, **ACTION_CHANGES[action])
    return world


def test_no_path_leaks() -> None:
    """
    On every path to an end: no room is held, nothing is pinned, and the request lives where the outcome says, once.

    Every pair (state, world) that can arise is visited.
    """
    start = (State.ASKING, World())
    paths: dict[tuple[State, World], str] = {start: State.ASKING.value}
    todo = deque([start])
    ends = set()
    while todo:
        state, world = todo.popleft()
        for (before, happening), (following, actions) in TRANSITIONS.items():
            if before is not state:
                continue
            later = world_after(world, state, happening, actions)
            path = f"{paths[state, world]} -{happening.value}-> {following.value}"
            if following in FINAL:
                ends.add(following)
                assert not later.room, f"room leaks: {path}"
                assert not later.pin, f"pin leaks: {path}"
                assert later.at_source == (following is State.STAYED), path
                assert later.at_target == (following in {State.MOVED, State.RECOMPUTED}), path
            elif (following, later) not in paths:
                paths[following, later] = path
                todo.append((following, later))
    assert ends == FINAL


def test_pages_are_up_to_date() -> None:
    """The pages of `docs/protocols` are what `draw.py` makes of the tables."""
    spec = importlib.util.spec_from_file_location("draw", PROTOCOLS / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, make in draw.PAGES.items():
        assert (PROTOCOLS / name).read_text() == make(), "run python docs/protocols/draw.py"
