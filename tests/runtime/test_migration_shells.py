"""
Every path through the migration table, in both shells: the simulated cluster and the runtime must end it alike.

The paths are generated from the table itself, so new transitions are covered too. Each path is also run with one
ignored event on the way. The test compares the states, the record's outcome and `detail`, and when a time limit
expires.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from migration_shells import MOVE, PROMPT_TOKENS, Ending, Live, Shell, Simulator

from cascadeinfer.core.migration import (
    IGNORED,
    OUTCOMES,
    ROOM_SLACK_TOKENS,
    TRANSITIONS,
    Happening,
    MigrationLimits,
    State,
)
from support.virtual_time import run

TICK_S = 1e-6
"""Shorter than anything takes here."""
CUT_FIRST = MigrationLimits(ask_s=0.5, cut_s=0.3, resume_s=1.0)
LEASE_FIRST = MigrationLimits(ask_s=0.5, cut_s=3.0, resume_s=1.0)
"""The lease leaves no time to pull before the cut has timed out."""
NO_TIMER = {(state, Happening.TIMED_OUT) for state in (State.WITHDRAWING, State.RECOMPUTING, State.RETURNING)}
"""Ignored by the table, and no shell sets a timer in these states, so they cannot be triggered."""
DEATHS = {Happening.SOURCE_LOST, Happening.TARGET_LOST}

Path = tuple[tuple[State, Happening], ...]


def paths(state: State = State.ASKING, path: Path = (), *, has_detour: bool = False) -> Iterator[Path]:
    """All paths from this state to an end, with at most one ignored event; no instance dies twice."""
    if state in OUTCOMES:
        yield path
        return
    for (before, happening), (following, _) in TRANSITIONS.items():
        if before is state and not _dies_again(path, happening):
            yield from paths(following, (*path, (state, happening)), has_detour=has_detour)
    if not has_detour:
        for before, happening in sorted(IGNORED - NO_TIMER, key=lambda pair: (pair[0].value, pair[1].value)):
            if before is state and not _dies_again(path, happening):
                yield from paths(state, (*path, (state, happening)), has_detour=True)


def _dies_again(path: Path, happening: Happening) -> bool:
    return happening in DEATHS and any(past is happening for _, past in path)


PATHS = list(paths())


async def follow(path: Path, shell: Shell) -> Ending:
    """Take a migration along this path, checking each state and each time limit."""
    await shell.begin()
    limits = shell_limits(path)
    began_s = {State.ASKING: shell.now_s}
    for state, happening in path:
        assert shell.migration.state is state, shell.migration.story
        if happening is Happening.TIMED_OUT:
            limit_s = {
                State.ASKING: limits.ask_s,
                State.COPYING: limits.resume_s,
                State.CUTTING: limits.cut_s,
                State.RESUMING: limits.resume_s,
            }[state]
            ends_s = began_s[State.CUTTING if state is State.RESUMING else state] + limit_s
            await shell.wait(ends_s - TICK_S)
            assert shell.migration.state is state, "the time is not up"
            await shell.wait(ends_s + TICK_S)
        else:
            if happening is Happening.CUT_LATE:
                await shell.wait(began_s[State.CUTTING] + limits.resume_s - limits.least_pull_s + TICK_S)
            await shell.bring(happening)
        began_s.setdefault(shell.migration.state, shell.now_s)
    assert shell.migration.state in OUTCOMES, shell.migration.story
    return await shell.end()


def shell_limits(path: Path) -> MigrationLimits:
    """Limits under which the path is possible."""
    limits = LEASE_FIRST if (State.CUTTING, Happening.CUT_LATE) in path else CUT_FIRST
    return replace(limits, precopy=(State.ASKING, Happening.ROOM_TO_COPY) in path)


def name_of(path: Path) -> str:
    """A readable name for a path."""
    return "-".join(happening.value for _, happening in path)


def test_the_paths_cover_the_table() -> None:
    """Every transition and every ignored event is on some path; only timers that are never set are left out."""
    live = {pair for pair in TRANSITIONS.keys() | IGNORED if pair[0] is not State.PARKED}  # only the simulator parks
    assert {pair for path in PATHS for pair in path} == live - NO_TIMER


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_both_shells_end_it_alike(path: Path) -> None:
    """Simulator and runtime give the policy and the records the same states, outcome and detail."""
    simulated = run(follow(path, Simulator(shell_limits(path))))
    live = run(follow(path, Live(shell_limits(path))))
    # In the simulator, an immediate event comes before the request for room has reached the target.
    asked = path[-1][0] is not State.ASKING or path[-1][1] is Happening.ROOM_REFUSED
    assert simulated == (live if asked else replace(live, asked_tokens=None))
    for ending in (simulated, live):
        assert ending.record == (ending.event.outcome.value, MOVE.reason.value, ending.event.detail)
        assert ending.event.outcome is OUTCOMES[TRANSITIONS[path[-1]][0]]


@pytest.mark.parametrize(
    ("n_tokens", "outcome", "detail"),
    [(ROOM_SLACK_TOKENS - 1, "moved", ""), (ROOM_SLACK_TOKENS, "stayed", "cut_refused:outgrew_room")],
)
def test_who_outgrows_its_room_is_not_cut(n_tokens: int, outcome: str, detail: str) -> None:
    """In both shells, a request that outgrows its reserved room while the target decides stays where it is."""

    async def growing(shell: Shell) -> Ending:
        await shell.begin()
        await shell.grow(n_tokens)
        await shell.bring(Happening.ROOM_GRANTED)
        await shell.deliver()
        if shell.migration.outcome is None:
            await shell.bring(Happening.CUT_DONE)
            await shell.bring(Happening.FIRST_TOKEN)
        return await shell.end()

    simulated, live = run(growing(Simulator(CUT_FIRST))), run(growing(Live(CUT_FIRST)))
    assert simulated == live
    assert live.record == (outcome, MOVE.reason.value, detail)
    assert live.asked_tokens == PROMPT_TOKENS + ROOM_SLACK_TOKENS
