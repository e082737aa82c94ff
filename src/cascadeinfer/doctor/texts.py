"""Compares texts, token by token."""

from collections.abc import Sequence


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs; None if the texts are the same."""
    if list(one) == list(other):
        return None
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
