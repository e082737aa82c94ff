"""Comparing texts."""

import pytest

from cascadeinfer.doctor.texts import first_difference


@pytest.mark.parametrize(
    ("one", "other", "at"),
    [([1, 2], [1, 2], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([], [], None)],
)
def test_the_first_difference(one: list[int], other: list[int], at: int | None) -> None:
    """A text that ends early differs where it ends."""
    assert first_difference(one, other) == at
