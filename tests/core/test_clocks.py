"""Converting a moment from our clock to another: never later than it is, and exact if one answer was immediate."""

from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.clocks import ANSWERS_KEPT, ClockBound

SECONDS = st.floats(0, 1e6)


@given(
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(SECONDS, st.floats(0, 100)), min_size=1, max_size=2 * ANSWERS_KEPT),
    SECONDS,
)
def test_never_later(lead_s: float, answers: list[tuple[float, float]], moment_s: float) -> None:
    """Whatever delays the answers, the moment is not too late, and at most the shortest delay too early."""
    bound = ClockBound()
    for answered_s, delay_s in answers:
        bound.answered(answered_s + lead_s, answered_s + delay_s)
    true_s = moment_s + lead_s
    quickest_s = min(delay_s for _, delay_s in answers[-ANSWERS_KEPT:])
    assert true_s - quickest_s - 1e-6 <= bound.at_other(moment_s) <= true_s + 1e-6


def test_nothing_known() -> None:
    """Before the first answer, every moment of the other clock has passed: no pull is allowed."""
    assert ClockBound().at_other(1e9) == float("-inf")
