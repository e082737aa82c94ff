"""Traces: what is refused, and that every change makes a new value and loses nothing silently."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.jsonl import from_jsonl, to_jsonl
from cascadeinfer.workload.trace import Trace

PLAIN = Trace.from_columns([10, 20, 30, 40], [1, 2, 3, 4], [0.0, 1.0, 1.0, 4.0])
HASHED = Trace.from_columns(
    [10, 20, 33], [1, 2, 3], [0.0, 1.0, 2.0], prefix_hashes=[[1], [1, 2], [1, 2, 3, 4]], prefix_block_tokens=8
)

columns = st.lists(
    st.tuples(
        st.integers(1, 10**6), st.integers(1, 10**5), st.floats(0.0, 1e6), st.lists(st.integers(0, 99), max_size=4)
    ),
    max_size=20,
)


@pytest.mark.parametrize(
    ("prompt", "output", "arrival", "complaint"),
    [
        ([1], [1, 1], [0.0], "columns differ in length"),
        ([1, 0], [1, 1], [0.0, 0.0], "row 2: prompt_tokens is below 1"),
        ([1, 1], [0, 1], [0.0, 0.0], "row 1: output_tokens is below 1"),
        ([1, 1], [1, 1], [1.0, 0.5], "row 2: arrival_s is before the row above"),
        ([1, 1], [1, 1], [-1.0, 0.5], "row 1: arrival_s is negative"),
        ([1, 1], [1, 1], [0.0, float("nan")], "row 2: arrival_s is negative or not finite"),
        ([1, 1], [1, 1], [0.0, float("inf")], "row 2: arrival_s is negative or not finite"),
    ],
)
def test_wrong_columns_are_refused(prompt: list[int], output: list[int], arrival: list[float], complaint: str) -> None:
    """The first wrong row is named."""
    with pytest.raises(TraceError, match=complaint):
        Trace.from_columns(prompt, output, arrival)


def test_hashes_need_a_block_size_and_one_list_per_request() -> None:
    """Prefix hashes without a block size are refused."""
    with pytest.raises(TraceError, match="come together"):
        Trace.from_columns([8], [1], [0.0], prefix_hashes=[[1]])
    with pytest.raises(TraceError, match="2 prefix lists for 1 requests"):
        Trace.from_columns([8], [1], [0.0], prefix_hashes=[[1], [2]], prefix_block_tokens=8)


def test_columns_cannot_be_written() -> None:
    """A trace is immutable and does not share its caller's arrays."""
    mine = np.array([5, 6])
    trace = Trace.from_columns(mine, [1, 1], [0.0, 0.0])
    mine[0] = 99
    assert trace.prompt_tokens[0] == 5
    with pytest.raises(ValueError, match="read-only"):
        trace.prompt_tokens[0] = 7


def test_rate_is_gaps_over_time() -> None:
    """Four requests over 4 s have three gaps: 0.75 per second. Without a span there is no rate."""
    assert PLAIN.rate_rps == pytest.approx(0.75)
    with pytest.raises(TraceError, match="span no time"):
        _ = Trace.from_columns([1, 1], [1, 1], [2.0, 2.0]).rate_rps
    with pytest.raises(TraceError, match="give a rate"):
        _ = Trace.from_columns([1, 1], [1, 1]).rate_rps


@given(rate=st.floats(1e-3, 1e4))
def test_scaling_sets_the_rate_and_keeps_the_pattern(rate: float) -> None:
    """Arrivals are stretched evenly; requests stay the same."""
    scaled = PLAIN.at_rate(rate)
    assert scaled.rate_rps == pytest.approx(rate)
    np.testing.assert_allclose(scaled.arrival_s / scaled.arrival_s[-1], PLAIN.arrival_s / PLAIN.arrival_s[-1])
    assert scaled.prompt_tokens.tolist() == PLAIN.prompt_tokens.tolist()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate: float) -> None:
    """A rate must be positive and finite."""
    with pytest.raises(TraceError, match="must be positive"):
        PLAIN.at_rate(rate)


def test_sampling_keeps_order_and_draws_each_once() -> None:
    """Without replacement, rows stay whole and in order; asking for more than there are is refused."""
    drawn = PLAIN.sample(3, np.random.default_rng(0))
    rows = list(zip(drawn.arrival_s, drawn.prompt_tokens, drawn.output_tokens, strict=True))
    every = list(zip(PLAIN.arrival_s, PLAIN.prompt_tokens, PLAIN.output_tokens, strict=True))
    assert rows == [row for row in every if row in rows]
    assert len(set(rows)) == 3
    with pytest.raises(TraceError, match="cannot draw 5 requests out of 4"):
        PLAIN.sample(5, np.random.default_rng(0))


def test_resampling_draws_whole_rows_evenly() -> None:
    """With replacement: prompt, output and hashes stay together, rows are equally likely, and times are dropped."""
    n = 30_000
    drawn = HASHED.resample(n, np.random.default_rng(1))
    assert not drawn.has_arrivals
    assert drawn.prefix_hashes is not None
    source = {(10, 1, (1,)), (20, 2, (1, 2)), (33, 3, (1, 2, 3, 4))}
    rows = list(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), drawn.prefix_hashes, strict=True))
    assert set(rows) == source
    for row in source:
        assert abs(rows.count(row) - n / 3) < 5 * np.sqrt(n * 2 / 9)
    order = drawn.prompt_tokens[: n // 2].mean(), drawn.prompt_tokens[n // 2 :].mean()
    assert order[0] == pytest.approx(order[1], rel=0.02), "drawn in random order"
    with pytest.raises(TraceError, match="empty"):
        Trace.from_columns([], []).resample(1, np.random.default_rng(0))


def test_a_window_starts_its_own_clock() -> None:
    """The window is half-open, and times count from its start."""
    part = PLAIN.window(1.0, 4.0)
    assert part.arrival_s.tolist() == [0.0, 0.0]
    assert part.prompt_tokens.tolist() == [20, 30]


def test_capping_is_counted() -> None:
    """In a context of 21, prompts of 30 and 40 keep 20 tokens, outputs what is left, and the counts say so."""
    capped = PLAIN.capped(21)
    assert capped.trace.prompt_tokens.tolist() == [10, 20, 20, 20]
    assert capped.trace.output_tokens.tolist() == [1, 1, 1, 1]
    assert (capped.prompts_cut, capped.outputs_cut) == (2, 3)
    with pytest.raises(TraceError, match="holds no prompt and output"):
        PLAIN.capped(1)


@given(rows=columns, context=st.integers(2, 2 * 10**6))
def test_capping_fits_and_never_lengthens(rows: list[tuple[int, int, float, list[int]]], context: int) -> None:
    """Afterwards every request fits and keeps at least a token of each kind; those that fitted before are unchanged."""
    trace = Trace.from_columns([p for p, _, _, _ in rows], [o for _, o, _, _ in rows])
    capped = trace.capped(context).trace
    assert (capped.total_tokens <= context).all()
    assert (capped.prompt_tokens <= trace.prompt_tokens).all()
    assert (capped.output_tokens <= trace.output_tokens).all()
    fits = trace.total_tokens <= context
    assert (capped.total_tokens[fits] == trace.total_tokens[fits]).all()


def test_a_cut_prompt_keeps_the_hashes_of_its_whole_blocks() -> None:
    """Cut to 20 tokens, with blocks of 8, two whole blocks are left; an uncut prompt keeps its last, partial hash."""
    capped = HASHED.capped(21).trace
    assert capped.prefix_hashes == ((1,), (1, 2), (1, 2))
    uncut = HASHED.capped(100).trace
    assert uncut.prefix_hashes == HASHED.prefix_hashes
    partial = Trace.from_columns([20], [1], prefix_hashes=[[1, 2, 3]], prefix_block_tokens=8).capped(100).trace
    assert partial.prefix_hashes == ((1, 2, 3),)


@given(rows=columns, times=st.booleans(), hashed=st.booleans())
def test_jsonl_loses_nothing(rows: list[tuple[int, int, float, list[int]]], times: bool, hashed: bool) -> None:
    """Saved and loaded, a trace is the same, to the last bit of its times."""
    trace = Trace.from_columns(
        [p for p, _, _, _ in rows],
        [o for _, o, _, _ in rows],
        sorted(a for _, _, a, _ in rows) if times else None,
        prefix_hashes=[h for _, _, _, h in rows] if hashed else None,
        prefix_block_tokens=16 if hashed else 0,
        dropped_rows=3,
    )
    back = from_jsonl(to_jsonl(trace))
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
    assert back.prefix_hashes == trace.prefix_hashes
    assert (back.prefix_block_tokens, back.dropped_rows, back.has_arrivals) == (16 if hashed else 0, 3, times)


HEADER = next(to_jsonl(PLAIN))


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "the file is empty"),
        (["{"], "line 1: "),
        ([HEADER.replace('"version":1', '"version":9')], "line 1: not a cascadeinfer-trace file of version 1"),
        ([HEADER, '{"prompt_tokens": 1}'], "line 2: .*output_tokens"),
        ([HEADER, '{"prompt_tokens": 1, "output_tokens": 1}'], "line 2: arrival_s does not agree"),
        ([HEADER, "", '{"prompt_tokens": 1.5, "output_tokens": 1, "arrival_s": 0}'], "line 3: .*int"),
        ([HEADER, '{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": 0, "x": 1}'], "line 2: .*unknown field"),
        (
            [HEADER, '{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": 0, "prefix_hashes": [1]}'],
            "line 2: prefix_hashes does not agree",
        ),
        ([HEADER, '{"prompt_tokens": 0, "output_tokens": 1, "arrival_s": 0}'], "row 1: prompt_tokens is below 1"),
    ],
)
def test_malformed_jsonl_is_refused_with_its_line(lines: list[str], complaint: str) -> None:
    """The error gives the line number and what is wrong."""
    with pytest.raises(TraceError, match=complaint):
        from_jsonl(lines)
