"""
The reasons for refusing a step of a migration: those an engine answers, and those a shell gives on an engine's behalf.

This module imports nothing of the core. The vLLM connector uses it inside vLLM's own processes, which must not load
numba, and most of the core imports numba.
"""

import enum
from typing import Self


class Refusal(enum.StrEnum):
    """
    Why a step of a migration is refused. The values go over the wire and, after the name of what was refused, into
    records, metrics and logs.
    """

    # Answers of the target when asked for room.
    NO_SLOT = "no_slot"
    """Its batch is full."""
    NO_BLOCKS = "no_blocks"
    """Its KV cache is full."""
    # Given by the shell on the target's behalf.
    TARGET_DOWN = "target_down"
    NOT_CONNECTED = "not_connected"
    """The KV cache cannot be transferred from the source to the target."""
    # Answers of the source when told to cut.
    UNKNOWN = "unknown"
    """The source has no such request, or no longer has it."""
    UNMOVABLE = "unmovable"
    """The request cannot be split into prompt and output."""
    WAITING = "waiting"
    """The request is not running: it has been preempted, or its KV cache is still being transferred."""
    PREFILLING = "prefilling"
    ALREADY_CUT = "already_cut"
    ENDING = "ending"
    """The next token is the last one."""
    # Given by the shell on the source's behalf.
    OUTGREW_ROOM = "outgrew_room"
    """The request has outgrown the reserved room."""
    # Answers of either the source or the target.
    MIGRATIONS = "migrations"
    """This instance already takes part in the maximum number of migrations, counted over all front-end processes."""

    @classmethod
    def read(cls, word: str | None) -> Self | None:
        """Parse a refusal from the wire; None means granted. Raises ValueError for an unknown word."""
        return None if word is None else cls(word)


def why_not_step_budget(n_tokens: int, least: int, most: int) -> str | None:
    """
    Why an instance cannot schedule at most this many tokens per step; None if it can.

    Args:
        n_tokens: The chunk budget.
        least: Tokens of a step in which every request that may run at once gets its next ones.
        most: Tokens of a step that the instance was started for.
    """
    if n_tokens > most:
        return f"a chunk budget of {n_tokens} is above the {most} tokens of a step that it was started with"
    if n_tokens < least:
        return f"a chunk budget of {n_tokens} is below the {least} tokens that its running requests need in a step"
    return None
