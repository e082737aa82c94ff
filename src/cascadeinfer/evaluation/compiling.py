"""
Says that numba compiles, while it does: once per installation, and again where its cache cannot be written.

Numba reports a compilation as an event, which it does not when a function comes from its cache; so whoever waits is
told the reason, and nobody else is told anything.
"""

from collections.abc import Callable
from typing import Any, Final

from numba.core import event

COMPILE: Final = "numba:compile"
NOTE: Final = "compiling the planner and the simulator, once per installation (up to a minute)"


class CompilationNote(event.Listener):  # type: ignore[misc]  # untyped
    """Says a sentence at the first compilation."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """
        Args:
            say: Takes the sentence.
        """
        self._say = say
        self._said = False

    def on_start(self, event: Any) -> None:  # noqa: ARG002 - numba's signature
        """See numba's Listener."""
        if not self._said:
            self._said = True
            self._say(NOTE)

    def on_end(self, event: Any) -> None:
        """See numba's Listener."""


def say_when_compiling(say: Callable[[str], None]) -> CompilationNote:
    """From now on, say so when numba compiles something, once. Returns what `stop_saying` takes."""
    note = CompilationNote(say)
    event.register(COMPILE, note)
    return note


def stop_saying(note: CompilationNote) -> None:
    """Say nothing any more."""
    event.unregister(COMPILE, note)
