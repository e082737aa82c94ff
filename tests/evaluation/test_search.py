"""The highest rate within an SLO, against functions whose answer is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.evaluation.search import highest_rate


@given(
    limit_rps=st.floats(min_value=1.0, max_value=100.0),
    steps=st.integers(min_value=0, max_value=12),
)
def test_answer_is_within_the_last_bracket_below_the_limit(limit_rps: float, steps: int) -> None:
    """For a step at the limit, the answer lies below it, and closer than the last bracket after these halvings."""
    found = highest_rate(lambda rate: 1.0 if rate <= limit_rps else 0.0, 1.0, 200.0, 0.9, steps)
    assert found.limited
    assert 1.0 <= found.rate_rps <= limit_rps
    assert math.log(limit_rps / found.rate_rps) <= math.log(200.0) / 2**steps + 1e-9
    assert len(found.tried) == steps + 2


def test_ends_say_so() -> None:
    """If nothing keeps the SLO, the answer is 0; if everything does, the highest rate tried, marked as no limit."""
    assert highest_rate(lambda _: 0.5, 1.0, 10.0, 0.9, 5).rate_rps == 0.0
    found = highest_rate(lambda _: 0.95, 1.0, 10.0, 0.9, 5)
    assert (found.rate_rps, found.limited) == (10.0, False)
    assert [rate for rate, _ in found.tried] == [1.0, 10.0]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_share_decides(share: float) -> None:
    """The answer is where the falling share crosses the required one."""
    found = highest_rate(lambda rate: 1.0 - rate / 100.0, 1.0, 100.0, share, 20)
    assert found.rate_rps == pytest.approx(100.0 * (1.0 - share), rel=1e-4)
