"""The fewest instances within an SLO: the search against known answers, percentiles by hand, bounds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.evaluation.capacity import alone_first_s, fewest_that, percentile_of


@given(answer=st.integers(1, 300), first=st.integers(1, 256), most=st.integers(1, 256))
def test_the_search_finds_the_fewest(answer: int, first: int, most: int) -> None:
    """For a step at the answer it is found, or the first number if that is larger; each is asked once, few in all."""
    first = min(first, most)
    asked: list[int] = []

    def keeps(n: int) -> bool:
        asked.append(n)
        return n >= answer

    found = fewest_that(keeps, first, most)
    assert found == (max(answer, first) if answer <= most else None)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(256) + 2
    assert all(first <= n <= most for n in asked)
    if found is not None and found > first:
        assert {found, found - 1} <= set(asked)


def test_a_percentile_is_one_of_the_values() -> None:
    """Of 1 to 100 the 99th is 99; what never came is late, what cannot be is left out."""
    values = np.arange(1.0, 101.0)
    assert percentile_of(values, 99.0) == 99.0
    assert percentile_of(values, 99.5) == 100.0
    assert percentile_of(np.append(values, [math.nan] * 50), 99.0) == 99.0
    assert percentile_of(np.append(values, [math.inf] * 2), 99.0) == math.inf
    assert percentile_of(np.array([math.nan]), 50.0) == 0.0


MODEL = StepModel(
    base_s=0.01, per_decode_s=0.001, per_kv_token_s=0.0, per_prefill_token_s=0.0001, per_prefill_attention_s=1e-8
)


def test_a_prompt_alone_takes_its_chunks() -> None:
    """1,000 tokens in one step, or in chunks of 400, 400 and 200: the same work, and two more empty steps."""
    whole_s = MODEL.step_s(BatchFeatures(0, 0, 0, 1000, 1000 * 1001 / 2))
    assert alone_first_s(MODEL, 1000, 1000) == pytest.approx(whole_s)
    assert alone_first_s(MODEL, 1000, 400) == pytest.approx(whole_s + 2 * MODEL.base_s)
