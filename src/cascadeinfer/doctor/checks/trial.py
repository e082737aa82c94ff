"""What two small instances did: their start, the moves and their texts, the pauses."""

import statistics
from collections.abc import Sequence
from typing import Final

from cascadeinfer.doctor.facts import Move, Started
from cascadeinfer.doctor.verdicts import Check, fault, ok, warning

PAUSE_GAPS: Final = 3.0
"""A move should take no longer than so many tokens."""
PAUSE_S: Final = 0.05
"""Nor does a shorter pause matter: the tiny model's steps are much shorter than a real model's."""
TRANSPORT_FIX: Final = "see the lines on transports; UCX_LOG_LEVEL=info says what UCX does"
DIRECTIONS: Final = (("0", "1"), ("1", "0"))


def started_checks(started: Started) -> list[Check]:
    """Two instances have started and shaken hands."""
    found = f"two started and shook hands in {started.seconds:.0f} s ({started.backend}, {started.device})"
    return [ok("instances", found)]


def move_checks(moves: Sequence[Move]) -> list[Check]:
    """One line per direction, and one for the pause."""
    checks = []
    for source, target in DIRECTIONS:
        chosen = [move for move in moves if (move.source, move.target) == (source, target)]
        if chosen:
            checks.append(_direction(f"moves {source} to {target}", chosen))
    counted = [move for move in moves if move.pulled and move.context_tokens > min(m.context_tokens for m in moves)]
    if counted:
        checks.append(_pause(counted))
    return checks


def _direction(name: str, moves: Sequence[Move]) -> Check:
    if refused := next((move.refusal for move in moves if move.refusal), ""):
        return fault(name, f"a request did not move: {refused}", "please attach the report to an issue")
    if failed := [move for move in moves if not move.pulled]:
        found = f"{len(failed)} of {len(moves)} KV caches could not be pulled and were recomputed"
        return fault(name, found, TRANSPORT_FIX)
    if wrong := [move for move in moves if move.differs_at is not None]:
        at = ", ".join(f"{move.differs_at} of {move.tokens} at {move.context_tokens} tokens" for move in wrong)
        found = f"{len(wrong)} of {len(moves)} texts differ from those without a move, from token {at}"
        return fault(name, found, "serve with one instance or without stages, and attach the report to an issue")
    contexts = f"{min(m.context_tokens for m in moves)} to {max(m.context_tokens for m in moves)} tokens"
    return ok(name, f"{len(moves)} requests of {contexts} moved with their KV cache, and all texts are the same")


def _pause(moves: Sequence[Move]) -> Check:
    pause_s = statistics.median(move.pause_s for move in moves)
    gaps = statistics.median(move.pause_s / move.gap_s for move in moves if move.gap_s > 0.0)
    found = f"{gaps:.1f} times the time between two tokens ({1e3 * pause_s:.0f} ms; median of {len(moves)} moves)"
    if gaps <= PAUSE_GAPS or pause_s <= PAUSE_S:
        return ok("pause of a move", found)
    return warning("pause of a move", f"{found}: long, or the machine is busy", TRANSPORT_FIX)
