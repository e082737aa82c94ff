"""Weights of objectives against sums over requests, one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.qoe import (
    W_ATTAIN_STEPS,
    W_ATTENTION,
    W_CHUNKS,
    W_LASTS,
    W_PROMPT,
    W_STARTS,
    W_STEPS,
    W_WAIT,
)
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.plan.objective import BalancedLatency, MeanNormalizedLatency, WeightedLatency

LONGEST_PROMPT = 3000
requests = st.lists(st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, 400)), min_size=1, max_size=12)
shares = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def brute_force(pairs: list[tuple[int, int]], normalised_share: float, row: int, below: int) -> float:
    """A row of `BalancedLatency` below a length, per request, from the objective's definition."""
    mean_output = sum(output for _, output in pairs) / len(pairs)
    total = 0.0
    for prompt, output in pairs:
        weight = normalised_share / output + (1.0 - normalised_share) / mean_output
        steps = len([length for length in range(prompt + 1, prompt + output) if length < below])
        starts = prompt < below
        decodes = output > 1
        total += {
            W_WAIT: weight * starts,
            W_PROMPT: weight * starts * prompt,
            W_ATTENTION: weight * starts * prompt * (prompt + 1) / 2,
            W_CHUNKS: weight * starts,  # every prompt fits into one step
            W_STEPS: weight * steps,
            W_STARTS: weight * starts * decodes,
            W_LASTS: weight * decodes * (prompt + output - 1 < below),
            W_ATTAIN_STEPS: steps / (output - 1) if decodes else 0.0,
        }[row]
    return total / len(pairs)


@given(pairs=requests, share=shares, data=st.data())
def test_balanced_weights_are_sums_over_requests(
    pairs: list[tuple[int, int]], share: float, data: st.DataObject
) -> None:
    """Each row, at any edge, is the sum of its definition over requests; one-token requests never decode."""
    histogram = LengthHistogram.from_requests(*zip(*pairs, strict=True), max_tokens=4096, buckets_per_octave=4)
    rows = BalancedLatency(share).rows(histogram, LONGEST_PROMPT)
    edge = data.draw(st.integers(0, len(histogram.edges_tokens) - 1))
    for row in range(W_WAIT, W_ATTAIN_STEPS + 1):
        expected = brute_force(pairs, share, row, int(histogram.edges_tokens[edge]))
        assert rows[row - W_WAIT, edge] == pytest.approx(expected, rel=1e-9, abs=1e-9), row


@given(pairs=requests)
def test_all_of_the_share_is_normalised_latency(pairs: list[tuple[int, int]]) -> None:
    """With the whole share, the weights are those of `MeanNormalizedLatency`, for prompts of several chunks, too."""
    histogram = LengthHistogram.from_requests(*zip(*pairs, strict=True), max_tokens=4096, buckets_per_octave=4)
    assert np.allclose(
        BalancedLatency(1.0).rows(histogram, 512), MeanNormalizedLatency().rows(histogram, 512), rtol=1e-12
    )


@given(pairs=requests)
def test_none_of_the_share_is_end_to_end_latency(pairs: list[tuple[int, int]]) -> None:
    """Without it, waits and prompts weigh as in the mean TTFT over the mean output."""
    histogram = LengthHistogram.from_requests(*zip(*pairs, strict=True), max_tokens=4096, buckets_per_octave=4)
    ttft = slice(0, W_STEPS - W_WAIT)
    assert np.allclose(
        histogram.mean_output_tokens * BalancedLatency(0.0).rows(histogram, 512)[ttft],
        WeightedLatency(1.0, 0.0).rows(histogram, 512)[ttft],
        rtol=1e-9,
    )


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    """Other numbers are errors that say so."""
    with pytest.raises(PlanError, match=r"lies in \[0, 1\]"):
        BalancedLatency(share)
