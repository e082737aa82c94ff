"""Whoever waits for numba is told why, once, and only then."""

from collections.abc import Iterator

import pytest
from numba import njit

from cascadeinfer.evaluation.compiling import NOTE, CompilationNote, say_when_compiling, stop_saying


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What has been said."""
    lines: list[str] = []
    note: CompilationNote = say_when_compiling(lines.append)
    yield lines
    stop_saying(note)


def test_a_compilation_is_said_once(said: list[str]) -> None:
    """At the first of several; a function that is compiled already says nothing."""
    one, two = njit(lambda x: x + 1), njit(lambda x: x + 2)
    assert said == []
    assert (one(1), two(1)) == (2, 3)
    assert said == [NOTE]


def test_what_is_compiled_already_is_not_said() -> None:
    """The function comes from memory, as from numba's cache on disk."""
    compiled = njit(lambda x: x + 1)
    compiled(1)
    lines: list[str] = []
    note = say_when_compiling(lines.append)
    assert compiled(2) == 3
    stop_saying(note)
    njit(lambda x: x + 3)(1)
    assert lines == []
