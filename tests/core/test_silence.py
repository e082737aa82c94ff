"""A silence is over after its limit, unless the listener itself has slept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.silence import Silence, oversleeps


def looks_until_over(silence: Silence, look_s: float) -> int:
    """How many punctual looks it takes until the silence is over."""
    n = 0
    while not silence.is_over:
        assert silence.looked(look_s, look_s) == 0.0
        n += 1
    return n


@pytest.mark.parametrize(("limit_s", "look_s", "n_looks"), [(60.0, 6.0, 10), (2.0, 0.2, 10), (60.0, 0.05, 1200)])
def test_a_silence_lasts_as_long_as_its_limit(limit_s: float, look_s: float, n_looks: int) -> None:
    """The limit counts in punctual looks; an answer starts the count again."""
    silence = Silence(limit_s)
    assert looks_until_over(silence, look_s) == n_looks
    silence.heard()
    assert looks_until_over(silence, look_s) == n_looks


@given(st.floats(1.0, 600.0), st.floats(0.0, 1e6), st.integers(0, 9))
def test_after_a_sleep_the_other_has_the_whole_limit_again(limit_s: float, slept_s: float, n_before: int) -> None:
    """However long the sleep was, and whatever had been counted before."""
    silence, look_s = Silence(limit_s), limit_s / 10
    for _ in range(n_before):
        silence.looked(look_s, look_s)
    slept_s += oversleeps(limit_s) + 0.001
    assert silence.looked(look_s, look_s + slept_s) == pytest.approx(slept_s)
    assert not silence.is_over
    assert looks_until_over(silence, look_s) == 10


def test_a_busy_loop_has_not_slept() -> None:
    """Looks that are always a little late do not make a hung peer immortal."""
    silence = Silence(60.0)
    for _ in range(120):
        silence.looked(0.05, 0.5)
    assert silence.is_over
