"""Ranges and capacities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceCapacity, LengthRange


def test_ranges_are_half_open() -> None:
    """A range contains its low end, but not its high end."""
    assert 0 in LengthRange(0, 512)
    assert 511 in LengthRange(0, 512)
    assert 512 not in LengthRange(0, 512)
    assert 10**9 in LengthRange(512)


@pytest.mark.parametrize(("lo", "hi"), [(5, 5), (6, 5), (-1, 5), (0, 0)])
def test_empty_and_negative_ranges_are_refused(lo: int, hi: int) -> None:
    """A range that is empty, or begins below zero, cannot be created."""
    with pytest.raises(ValueError, match="empty or negative"):
        LengthRange(lo, hi)


def test_ranges_print_as_they_are_written() -> None:
    """A range prints in the form of the command line."""
    assert str(LengthRange(0, 512)) == "0-512"
    assert str(LengthRange(512)) == "512-"
    assert str(LengthRange(512, UNBOUNDED_TOKENS)) == "512-"


def test_ranges_sort_by_length() -> None:
    """Ranges compare by low end, then by high end."""
    assert sorted([LengthRange(5, 9), LengthRange(0), LengthRange(0, 5)]) == [
        LengthRange(0, 5),
        LengthRange(0),
        LengthRange(5, 9),
    ]


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_blocks_are_enough_and_not_more(length_tokens: int, block_size_tokens: int) -> None:
    """`blocks_for` gives the fewest blocks that hold the tokens."""
    capacity = InstanceCapacity(1000, block_size_tokens, 8, 2048)
    n_blocks = capacity.blocks_for(length_tokens)
    assert (n_blocks - 1) * block_size_tokens < length_tokens <= n_blocks * block_size_tokens
    assert capacity.kv_tokens == 1000 * block_size_tokens
