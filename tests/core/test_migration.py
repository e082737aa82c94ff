"""The migration table is complete, has no dead ends, and leaks no room, pins or attempts on any path."""

import importlib.util
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cascadeinfer.core.effects import MigrationReason, StartMigration
from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.migration import (
    IGNORED,
    LEASE_MARGIN_S,
    OUTCOMES,
    TRANSITIONS,
    Action,
    Happening,
    Migration,
    MigrationLimits,
    NotBegun,
    PullEstimate,
    State,
    not_begun,
)
from cascadeinfer.core.refusals import Refusal

FINAL = set(OUTCOMES)
OPEN = [state for state in State if state not in FINAL]
MOVE = StartMigration("test", "m", "r", "a", "b", MigrationReason.OPERATOR)
PROTOCOLS = Path(__file__).parents[2] / "docs" / "protocols"


def migration_in(state: State) -> Migration:
    """A migration that is in this state."""
    return Migration(MOVE, 10, state=state)


def test_final_states_have_outcomes() -> None:
    """Final states and outcomes correspond one to one; nothing leaves a final state."""
    assert sorted(OUTCOMES.values()) == sorted(MigrationOutcome)
    assert not [key for key in TRANSITIONS if key[0] in FINAL]
    for state in State:
        assert (migration_in(state).outcome is not None) == (state in FINAL)


@pytest.mark.parametrize("state", OPEN)
def test_open_states_take_every_blow(state: State) -> None:
    """Every open state handles the client's disconnection and the death of either instance."""
    for happening in (Happening.CLIENT_LEFT, Happening.SOURCE_LOST, Happening.TARGET_LOST, Happening.REQUEST_ENDED):
        assert (state, happening) in TRANSITIONS or (state, happening) in IGNORED
    assert TRANSITIONS[state, Happening.CLIENT_LEFT][0] is State.ENDED


def test_nothing_is_both_followed_and_ignored() -> None:
    """No combination is in both tables."""
    assert not TRANSITIONS.keys() & IGNORED


@pytest.mark.parametrize("happening", Happening)
@pytest.mark.parametrize("state", State)
def test_each_pair_is_followed_ignored_or_refused(state: State, happening: Happening) -> None:
    """A combination in the table leads on; an ignored one changes nothing; any other raises and changes nothing."""
    migration = migration_in(state)
    story = list(migration.story)
    key = (state, happening)
    if key in TRANSITIONS:
        following, actions = TRANSITIONS[key]
        assert migration.handle(happening, 0.0) == actions
        assert migration.state is following
        assert migration.story == [*story, f"({happening.value})", following.value]
    elif key in IGNORED:
        assert migration.handle(happening, 0.0) == ()
        assert migration.state is state
        assert migration.story == story
    else:
        with pytest.raises(InvalidTransition) as raised:
            migration.handle(happening, 0.0)
        assert (raised.value.state, raised.value.event) == (state.value, happening.value)
        assert raised.value.story == tuple(story)
        assert migration.state is state
        assert migration.story == story


def test_every_state_is_reachable_and_leads_to_an_end() -> None:
    """Each state can be reached from one of the first, each open one reaches a final one, and each action is used."""
    after: dict[State, set[State]] = {state: set() for state in State}
    for (state, _), (following, _) in TRANSITIONS.items():
        after[state].add(following)
    assert reach(after, State.ASKING) | reach(after, State.PARKED) == set(State)
    for state in OPEN:
        assert reach(after, state) & FINAL
    used = {action for _, actions in TRANSITIONS.values() for action in actions}
    assert used | {Action.ASK_ROOM} == set(Action)  # ASK_ROOM begins each migration


def test_a_parked_request_has_its_cut_behind_it() -> None:
    """Its migration asks for room and goes on to the pull; the lease counts from its beginning."""
    limits = MigrationLimits(ask_s=0.5, resume_s=3.0)
    migration = Migration.of_parked(MOVE, 10, limits, 100.0)
    assert migration.limit_s(100.0) == 0.5
    assert migration.handle(GRANTED, 100.4) == (Action.RESUME,)
    assert migration.state is State.RESUMING
    assert migration.limit_s(101.0) == pytest.approx(2.0)
    assert migration.story == ["parked", "(room_granted)", "resuming"]
    refused = Migration.of_parked(MOVE, 10, limits, 100.0)
    assert refused.handle(Happening.ROOM_REFUSED, 100.1, Refusal.NO_BLOCKS) == ()
    assert (refused.outcome, refused.detail) == (MigrationOutcome.STAYED, "room_refused:no_blocks")


def reach(after: dict[State, set[State]], start: State) -> set[State]:
    """All states that can follow, `start` included."""
    seen, todo = {start}, deque([start])
    while todo:
        for state in after[todo.popleft()] - seen:
            seen.add(state)
            todo.append(state)
    return seen


GRANTED, CUT, TOKEN = Happening.ROOM_GRANTED, Happening.CUT_DONE, Happening.FIRST_TOKEN
TO_COPY, COPIED, NOT_COPIED = Happening.ROOM_TO_COPY, Happening.COPIED, Happening.NOT_COPIED
LATE, GONE = Happening.TIMED_OUT, Happening.TARGET_LOST


@pytest.mark.parametrize(
    ("happenings", "detail"),
    [
        pytest.param([GRANTED, CUT, TOKEN], "", id="all as asked"),
        pytest.param([TO_COPY, COPIED, CUT, TOKEN], "", id="copied ahead"),
        pytest.param([TO_COPY, NOT_COPIED, CUT, TOKEN], "", id="copied in vain"),
        pytest.param([TO_COPY, LATE], "timed_out", id="the copy takes too long"),
        pytest.param([Happening.ROOM_REFUSED], "room_refused:no_slot", id="the target's refusal"),
        pytest.param([GRANTED, Happening.CUT_REFUSED], "cut_refused:no_slot", id="the source's refusal"),
        pytest.param([GRANTED, LATE, Happening.CUT_UNDONE], "timed_out", id="withdrawn"),
        pytest.param([GRANTED, LATE, Happening.CUT_REFUSED], "timed_out", id="withdrawn, refused after all"),
        pytest.param([GRANTED, LATE, GONE, Happening.CUT_UNDONE], "timed_out", id="withdrawn, then the target died"),
        pytest.param([GRANTED, GONE, Happening.CUT_EMPTY, TOKEN], "target_lost", id="withdrawn in vain"),
        pytest.param([GRANTED, LATE, Happening.SOURCE_LOST], "source_lost", id="news while withdrawing"),
        pytest.param([GRANTED, Happening.CUT_LATE, TOKEN], "cut_late", id="taken back"),
        pytest.param([GRANTED, CUT, LATE, GONE, TOKEN], "timed_out", id="taken back, then the target died"),
        pytest.param([GRANTED, CUT, LATE, Happening.PLACE_SILENT], "place_silent", id="taken back in vain"),
        pytest.param([GRANTED, Happening.CUT_EMPTY, TOKEN], "cut_empty", id="computed anew"),
    ],
)
def test_detail_is_the_last_thing_that_explains(happenings: list[Happening], detail: str) -> None:
    """Granted answers, ignored happenings and the source's answers to a withdrawal explain nothing."""
    migration = migration_in(State.ASKING)
    for happening in happenings:
        is_refusal = happening in {Happening.ROOM_REFUSED, Happening.CUT_REFUSED}
        migration.handle(happening, 0.0, Refusal.NO_SLOT if is_refusal else None)
    ended = migration.ended()
    assert (ended.outcome, ended.detail) == (OUTCOMES[migration.state], detail)


def test_only_a_plain_move_has_no_detail() -> None:
    """On every path, the detail is empty for `moved`, and a reason for every other outcome."""
    todo = [migration_in(State.ASKING)]
    while todo:
        before = todo.pop()
        if before.outcome is not None:
            assert (before.detail == "") == (before.outcome is MigrationOutcome.MOVED), before.story
            continue
        for state, happening in TRANSITIONS:
            if state is before.state:
                after = replace(before, story=list(before.story))
                after.handle(happening, 0.0)
                todo.append(after)


def test_a_migration_that_does_not_begin() -> None:
    """A live request has stayed, one that is over has ended; the detail says why."""
    stays = not_begun(MOVE, NotBegun.SUSPECTED, is_live=True)
    assert (stays.migration_id, stays.outcome, stays.detail) == ("m", MigrationOutcome.STAYED, "suspected")
    over = not_begun(MOVE, NotBegun.STALE, is_live=False)
    assert (over.outcome, over.detail) == (MigrationOutcome.ENDED, "stale")


LIMITS = MigrationLimits(ask_s=1.0, cut_s=2.0, resume_s=3.0, least_pull_s=0.5, room_slack_tokens=8)


def test_limits_of_states() -> None:
    """
    Asking and cutting have limits of their own; resuming ends at a time that counts from when the cut was sent. No
    other state ends by itself.
    """
    migration = Migration(MOVE, 10, LIMITS)
    assert migration.limit_s(50.0) == 1.0
    migration.handle(Happening.ROOM_GRANTED, 100.0)
    assert (migration.limit_s(100.0), migration.cut_sent_s, migration.deadline_s) == (2.0, 100.0, 103.0)
    migration.handle(Happening.CUT_DONE, 101.5)
    assert migration.limit_s(101.5) == 1.5
    assert [migration.is_overdue(now_s) for now_s in (102.9, 103.0)] == [False, True]
    migration.handle(Happening.TIMED_OUT, 103.0)
    assert migration.limit_s(103.0) is None
    assert not migration.is_overdue(200.0)


def test_what_news_of_a_cut_means() -> None:
    """Nothing pinned is empty; less time left than a pull needs is late; all else is done."""
    migration = Migration(MOVE, 10, LIMITS)
    migration.handle(Happening.ROOM_GRANTED, 100.0)
    assert migration.cut_heard(100.0, 0) is Happening.CUT_EMPTY
    assert migration.cut_heard(102.5, 9) is Happening.CUT_DONE
    assert migration.cut_heard(102.75, 9) is Happening.CUT_LATE
    migration.limits = replace(LIMITS, least_pull_s=0.0)
    assert migration.cut_heard(103.0, 9) is Happening.CUT_LATE


def test_room() -> None:
    """The target is asked for the slack as well; a request whose next token would exceed the room is not cut."""
    migration = Migration(MOVE, 10, LIMITS)
    assert migration.room_tokens == 18
    assert [migration.has_outgrown_room(n_tokens) for n_tokens in (17, 18)] == [False, True]


def test_when_to_copy_ahead() -> None:
    """
    Where it is allowed, and the pull outlasts the steps that any pause has; a link that is not known is tried. A parked
    request, which decodes nowhere, is not.
    """
    limits = replace(LIMITS, precopy=True)

    def heard(estimate: PullEstimate | None, limits: MigrationLimits = limits) -> Happening:
        return Migration(MOVE, 10, limits, estimate=estimate).room_heard()

    assert heard(PullEstimate()) is Happening.ROOM_TO_COPY
    assert heard(PullEstimate(0.031, 0.01)) is Happening.ROOM_TO_COPY
    assert heard(PullEstimate(0.029, 0.01)) is Happening.ROOM_GRANTED
    assert heard(PullEstimate(0.001, 0.0)) is Happening.ROOM_TO_COPY
    assert heard(None) is Happening.ROOM_GRANTED
    assert heard(PullEstimate(), LIMITS) is Happening.ROOM_GRANTED
    assert Migration.of_parked(MOVE, 10, limits, 0.0).room_heard() is Happening.ROOM_GRANTED


def test_room_for_what_grows_meanwhile() -> None:
    """A request that is copied ahead gets as many tokens meanwhile as the copy has token times."""
    limits = replace(LIMITS, precopy=True)
    assert Migration(MOVE, 10, limits, estimate=PullEstimate(0.405, 0.01)).room_tokens == 10 + 8 + 41
    assert Migration(MOVE, 10, limits, estimate=PullEstimate(0.01, 0.01)).room_tokens == 10 + 8
    assert Migration(MOVE, 10, limits, estimate=PullEstimate(0.405)).room_tokens == 10 + 8
    assert Migration(MOVE, 10, LIMITS, estimate=PullEstimate(0.405, 0.01)).room_tokens == 10 + 8


def test_the_copy_has_its_own_deadline() -> None:
    """It counts from when the source is asked for its blocks; the pull's counts from the cut."""
    migration = Migration(MOVE, 10, replace(LIMITS, precopy=True), estimate=PullEstimate())
    migration.handle(TO_COPY, 100.0)
    assert (migration.limit_s(100.0), migration.copy_deadline_s) == (3.0, 103.0)
    assert not migration.is_overdue(200.0)
    migration.copied_tokens = 8
    migration.handle(COPIED, 101.0)
    assert (migration.limit_s(101.0), migration.deadline_s) == (2.0, 104.0)
    migration.handle(CUT, 101.0)
    migration.handle(TOKEN, 102.0)
    assert migration.ended().copied_tokens == 8


def test_limits_under_a_lease() -> None:
    """A pull ends a margin before the lease does; the default limits are those of the default lease."""
    assert MigrationLimits.under_lease(10.0) == MigrationLimits()
    assert MigrationLimits.under_lease(30.0).resume_s == 30.0 - LEASE_MARGIN_S


def test_refusals_travel_as_their_words() -> None:
    """Every refusal round-trips through its word; no word means granted; an unknown word is an error."""
    assert [Refusal.read(refusal.value) for refusal in Refusal] == list(Refusal)
    assert Refusal.read(None) is None
    with pytest.raises(ValueError, match="no_room"):
        Refusal.read("no_room")


def test_at_target_follows_the_request() -> None:
    """From the resumption on, the request is in the target's hands."""
    assert {state for state in State if migration_in(state).at_target} == {
        State.RESUMING,
        State.RECOMPUTING,
        State.MOVED,
        State.RECOMPUTED,
    }


@dataclass(frozen=True)
class World:
    """
    What may exist outside after a path through the table.

    Attributes:
        room: Whether the target may hold room for the request.
        copy: Whether the source may hold full blocks for the target.
        pin: Whether the source may hold the cut request's blocks.
        at_source: Whether an attempt at the source may live.
        at_target: Whether an attempt at the target may live.
    """

    room: bool = True
    copy: bool = False
    pin: bool = False
    at_source: bool = True
    at_target: bool = False
    target_up: bool = True


HAPPENING_CHANGES: dict[Happening, dict[str, bool]] = {
    Happening.ROOM_REFUSED: {"room": False},
    Happening.TARGET_LOST: {"room": False, "at_target": False, "target_up": False},
    Happening.SOURCE_LOST: {"pin": False, "copy": False, "at_source": False},
    Happening.CUT_DONE: {"at_source": False},
    Happening.CUT_EMPTY: {"at_source": False, "pin": False},
    Happening.CUT_LATE: {"at_source": False},
    Happening.CUT_REFUSED: {"pin": False},
    Happening.CUT_UNDONE: {"pin": False},
}
"""What a happening itself does to the world in every state, before any action."""
ENDED_AT_SOURCE = {"at_source": False, "pin": False}
STATE_CHANGES: dict[tuple[State, Happening], dict[str, bool]] = {
    (State.ASKING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.COPYING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.CUTTING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.WITHDRAWING, Happening.REQUEST_ENDED): ENDED_AT_SOURCE,
    (State.RETURNING, Happening.REQUEST_ENDED): {"at_source": False},
    (State.RESUMING, Happening.REQUEST_ENDED): {"at_target": False},
    (State.RECOMPUTING, Happening.REQUEST_ENDED): {"at_target": False},
    (State.RESUMING, Happening.FIRST_TOKEN): {"pin": False},  # pulled, which frees the source
}
"""The same for happenings whose effect depends on the state."""
ACTION_CHANGES: dict[Action, dict[str, bool]] = {
    Action.COPY: {"copy": True},
    Action.RELEASE_COPY: {"copy": False},
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
    On every path to an end, no room is held, nothing is pinned, and the request lives once, where the outcome says.

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
                assert not later.copy, f"full blocks leak: {path}"
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
