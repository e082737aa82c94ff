"""
Why somebody that a migration needs says no: what an engine answers, and what a shell says in its place.

Imports nothing of the core: the vLLM connector uses it in vLLM's own processes, where numba, which most of the core brings in, must
not be loaded.
"""

import enum
from typing import Self


class Refusal(enum.StrEnum):
    """Why somebody says no. The values are the words on the wire and, behind what was refused, in records, metrics and logs."""

    # The target, asked for room.
    NO_SLOT = "no_slot"
    """Its batch is full."""
    NO_BLOCKS = "no_blocks"
    """Its KV cache is full."""
    # The shell in its place.
    TARGET_DOWN = "target_down"
    NOT_CONNECTED = "not_connected"
    """KV cache cannot go from the source to the target."""
    # The source, told to cut.
    UNKNOWN = "unknown"
    """It has no such request (any more)."""
    UNMOVABLE = "unmovable"
    """The request cannot be taken apart into prompt and output."""
    WAITING = "waiting"
    """The request does not run: it has been preempted, or its KV cache is still on the way."""
    PREFILLING = "prefilling"
    ALREADY_CUT = "already_cut"
    ENDING = "ending"
    """The next token is the last one."""
    # The shell in its place.
    OUTGREW_ROOM = "outgrew_room"
    """The request has grown past the room asked for."""
    # Source or target.
    MIGRATIONS = "migrations"
    """As many migrations from or to this instance are under way as may be, those of all front-end processes together."""

    @classmethod
    def read(cls, word: str | None) -> Self | None:
        """What came over the wire; None: granted. An unknown word raises ValueError."""
        return None if word is None else cls(word)
