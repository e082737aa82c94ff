"""Length histograms against sums over requests, one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.histogram import Column, HistogramBuilder, LengthHistogram, log_edges
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.types import LengthRange

requests = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 400)), min_size=1, max_size=12)


def brute_force(pairs: list[tuple[int, int]], column: int, lo: int, hi: int) -> float:
    """Sum of a column over lengths in [lo, hi), per request, from its definition."""
    total = 0.0
    for prompt, output in pairs:
        attention = prompt * (prompt + 1) / 2
        by_steps = 1 / (output - 1) if output > 1 else 0.0
        steps = [length for length in range(prompt + 1, prompt + output) if lo <= length < hi]
        starts = lo <= prompt < hi
        ends_step = lo <= prompt + output - 1 < hi
        total += {
            Column.STEPS: len(steps),
            Column.KV_STEPS: sum(steps),
            Column.STARTS: starts,
            Column.PROMPT: starts * prompt,
            Column.ATTENTION: starts * attention,
            Column.PROMPT_SQ: starts * prompt**2,
            Column.PROMPT_ATTENTION: starts * prompt * attention,
            Column.ATTENTION_SQ: starts * attention**2,
            Column.LAST_STEPS: ends_step,
            Column.ENDS: lo <= prompt + output < hi,
            Column.STEPS_NL: len(steps) / output,
            Column.KV_STEPS_NL: sum(steps) / output,
            Column.STARTS_NL: starts / output,
            Column.PROMPT_NL: starts * prompt / output,
            Column.ATTENTION_NL: starts * attention / output,
            Column.DECODING_STARTS_NL: starts * (output > 1) / output,
            Column.LAST_STEPS_NL: ends_step * (output > 1) / output,
            Column.STEPS_TPOT: len(steps) * by_steps,
            Column.STARTS_TPOT: starts * by_steps,
            Column.LAST_STEPS_TPOT: ends_step * by_steps,
            Column.DECODING_STARTS: starts * (output > 1),
        }[column]
    return total / len(pairs)


@given(pairs=requests, data=st.data())
def test_columns_are_sums_over_requests(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    """Each column, over any range of whole buckets, is the sum of its definition over requests."""
    histogram = LengthHistogram.from_requests(*zip(*pairs, strict=True), max_tokens=4096, buckets_per_octave=4)
    edges = histogram.edges_tokens
    lo, hi = sorted(data.draw(st.lists(st.integers(0, len(edges) - 1), min_size=2, max_size=2, unique=True)))
    lengths = LengthRange(int(edges[lo]), int(edges[hi]))
    for column in Column:
        expected = brute_force(pairs, column, lengths.lo_tokens, lengths.hi_tokens)
        assert histogram.total(column, lengths) == pytest.approx(expected, rel=1e-9, abs=1e-6), column


@given(pairs=requests)
def test_hand_overs_are_requests_that_decode_on_both_sides(pairs: list[tuple[int, int]]) -> None:
    """At each edge, the hand-overs are the requests that start below it and make a decode step at it or beyond."""
    histogram = LengthHistogram.from_requests(*zip(*pairs, strict=True), max_tokens=4096, buckets_per_octave=4)
    for edge, crossing in zip(histogram.edges_tokens, histogram.hand_overs, strict=True):
        expected = sum(p < edge <= p + o - 1 for p, o in pairs) / len(pairs)
        assert crossing == pytest.approx(expected, abs=1e-9)


@given(first=requests, second=requests)
def test_merge_is_the_histogram_of_both(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    """Merging two builders gives the histogram of all their requests, as does adding requests one by one."""
    together = HistogramBuilder()
    together.add_many(*zip(*(first + second), strict=True))
    one, other = HistogramBuilder(), HistogramBuilder()
    for prompt, output in first:
        one.add(prompt, output)
    other.add_many(*zip(*second, strict=True))
    one.merge(other)
    assert one.requests == pytest.approx(together.requests)
    assert np.allclose(one.snapshot().prefix, together.snapshot().prefix, rtol=1e-12)


def test_decay_lets_the_past_count_less() -> None:
    """After decaying by a half, a new request weighs as much as two old ones."""
    builder = HistogramBuilder()
    builder.add_many([100, 100], [10, 10])
    builder.decay(0.5)
    builder.add(1000, 10)
    snapshot = builder.snapshot()
    assert snapshot.requests == pytest.approx(2.0)
    assert snapshot.mean_prompt_tokens == pytest.approx(550.0)


def test_decay_alone_changes_nothing_but_the_weight() -> None:
    """Per request, a histogram that has only decayed is unchanged."""
    builder = HistogramBuilder()
    builder.add_many([100, 2000], [10, 300])
    before = builder.snapshot()
    builder.decay(0.25)
    after = builder.snapshot()
    assert after.requests == pytest.approx(before.requests / 4)
    assert np.allclose(after.prefix, before.prefix)


def test_snapshot_stays_as_it_is() -> None:
    """A snapshot is read-only, and later requests do not change it."""
    builder = HistogramBuilder()
    builder.add(100, 10)
    snapshot = builder.snapshot()
    builder.add(5000, 10)
    assert snapshot.longest_tokens < 200
    with pytest.raises(ValueError, match="read-only"):
        snapshot.prefix[0, 0] = 1.0


def test_means_and_longest() -> None:
    """Mean prompt and output are exact; the longest length is known to its bucket."""
    histogram = LengthHistogram.from_requests([100, 300], [20, 60])
    assert histogram.mean_prompt_tokens == pytest.approx(200.0)
    assert histogram.mean_output_tokens == pytest.approx(40.0)
    assert 360 <= histogram.longest_tokens < 360 * 1.05


@given(max_tokens=st.integers(1, 1 << 20), per_octave=st.integers(1, 32))
def test_edges_cover_every_length_once(max_tokens: int, per_octave: int) -> None:
    """Edges start at 0, rise strictly, end just above the longest length, and are never wider than requested."""
    edges = log_edges(max_tokens, per_octave)
    assert edges[0] == 0
    assert edges[-1] == max_tokens + 1
    assert np.all(np.diff(edges) > 0)
    lo, hi = edges[1:-1], edges[2:]
    assert np.all((hi - lo == 1) | (hi <= np.ceil(lo * 2.0 ** (1.0 / per_octave)) + 1))


@pytest.mark.parametrize(
    ("prompts", "outputs", "said"),
    [
        ([0], [5], r"prompt_tokens\[0\] is 0"),
        ([5, 5], [5, -1], r"output_tokens\[1\] is -1"),
        ([5.5], [5], r"prompt_tokens\[0\] is 5.5"),
        ([float("nan")], [5], r"prompt_tokens\[0\] is nan"),
        ([5], [float("inf")], r"output_tokens\[0\] is inf"),
        ([5, 6], [5], "2 prompt lengths but 1 output lengths"),
        ([4000], [97], "4000 \\+ 97 tokens is longer than the histogram's 4096"),
        (["a"], [5], "sequence of numbers"),
    ],
)
def test_bad_lengths_are_named_and_add_nothing(prompts: list, outputs: list, said: str) -> None:
    """Bad lengths raise an error that names them, and the builder is unchanged."""
    builder = HistogramBuilder(max_tokens=4096)
    builder.add(7, 7)
    with pytest.raises(PlanError, match=said):
        builder.add_many([*prompts], [*outputs])
    assert builder.requests == 1.0


def test_one_bad_request_is_refused() -> None:
    """Adding one request makes the same checks as adding many, and refuses fractions of a token."""
    builder = HistogramBuilder(max_tokens=100)
    with pytest.raises(PlanError, match=r"prompt_tokens\[0\] is 0"):
        builder.add(0, 3)
    with pytest.raises(PlanError, match="longer than the histogram's 100"):
        builder.add(99, 2)
    with pytest.raises(TypeError):
        builder.add(5.5, 3)
    assert builder.requests == 0.0


def test_bad_settings_are_refused() -> None:
    """An empty histogram, a decay above 1, different buckets and a length that is no edge are errors."""
    builder = HistogramBuilder()
    with pytest.raises(PlanError, match="empty"):
        builder.snapshot()
    with pytest.raises(PlanError, match="decay factor"):
        builder.decay(1.5)
    with pytest.raises(PlanError, match="different buckets"):
        builder.merge(HistogramBuilder(max_tokens=100))
    with pytest.raises(PlanError, match="max_tokens"):
        HistogramBuilder(max_tokens=0)
    with pytest.raises(PlanError, match="not a bucket edge"):
        LengthHistogram.from_requests([100], [10]).edge_index(1001)
