"""The wait before a restart grows with the deaths in a sliding window."""

from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.back_off import BackOff

FIRST_S, MAX_S, WINDOW_S = 1.0, 60.0, 600.0


def test_deaths_in_the_window_count() -> None:
    """1, 2, 4 ... up to the maximum; an instance that dies every six minutes waits two seconds each time, not one."""
    back_off = BackOff(FIRST_S, MAX_S, WINDOW_S)
    assert [back_off.died(float(n), "") for n in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    slow = BackOff(FIRST_S, MAX_S, WINDOW_S)
    assert [slow.died(360.0 * n, "") for n in range(5)] == [1, 2, 2, 2, 2]
    faster = BackOff(FIRST_S, MAX_S, WINDOW_S)
    assert [faster.died(150.0 * n, "") for n in range(6)] == [1, 2, 4, 8, 8, 8]


def test_old_deaths_are_forgotten_one_by_one() -> None:
    """A window without a death is a clean slate; the count shown is the count that matters."""
    back_off = BackOff(FIRST_S, MAX_S, WINDOW_S)
    for at_s, why in ((0.0, "a"), (300.0, "b")):
        back_off.died(at_s, why)
    assert [d.why for d in back_off.in_window(599.0)] == ["a", "b"]
    assert [d.why for d in back_off.in_window(600.0)] == ["b"]
    assert back_off.died(600.0, "c") == 2.0
    assert back_off.died(1200.0, "d") == 1.0


@given(st.lists(st.floats(0.0, 700.0), max_size=200))
def test_never_too_short_nor_too_long(gaps_s: list[float]) -> None:
    """The wait is that of the deaths in the window, within its bounds, however many there have been."""
    back_off, now_s = BackOff(FIRST_S, MAX_S, WINDOW_S), 0.0
    died_s: list[float] = []
    for gap_s in gaps_s:
        now_s += gap_s
        died_s.append(now_s)
        n = sum(now_s - at_s < WINDOW_S for at_s in died_s)
        assert back_off.died(now_s, "") == min(FIRST_S * 2.0 ** (n - 1), MAX_S)
