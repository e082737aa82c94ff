"""The kernel grid of the GPU check: pairs of batches that read the same, and plain torch as its stand-in."""

# ruff: noqa: E402 - the modules need torch, which an environment without an engine does not have

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu_check"))

from kernel_times import GRIDS, Grid, agreeing, measure, pairs_of
from predictions import DEVICE_NAMES, DEVICES, device_known, kernel_model, predicted
from row_log import RowLog

from cascadeinfer.core.cost.splitkv import SplitRule
from cascadeinfer.profiling.kernels.calls import Kernel, PagedBatch, Shape, largest_error, plain_torch
from cascadeinfer.profiling.kernels.pairs import FIXED, drawn_pair, equal_lengths, fixed_pairs
from cascadeinfer.workload.trace import Trace

SMALL = Shape(4, 2, 16, head_dim=32)
TINY = Grid(((4, 2),), (16,), (0, 24), 1024, 6, 32_768, 2)
KEYS = {"ratio", "mixed_us", "equal_us", "predicted", "simulated", "copies", "kv_tokens", "requests"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small operations on a busy machine."""
    torch.set_num_threads(1)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=300))
def test_equal_lengths_have_the_count_and_total_of_the_mixed(lengths: list[int]) -> None:
    """And differ by one token at most."""
    equal = equal_lengths(tuple(lengths))
    assert len(equal) == len(lengths)
    assert sum(equal) == sum(lengths)
    assert max(equal) - min(equal) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 50_000), st.integers(1, 5_000)), min_size=1, max_size=40),
    st.integers(1, 64),
    st.integers(1, 2000),
    st.integers(0, 2**31),
)
def test_drawn_pairs_have_equal_counts_and_totals(
    requests: list[tuple[int, int]], count: int, divisor: int, seed: int
) -> None:
    """Whatever the trace; no length exceeds the longest, and each request has at least a token."""
    prompts, outputs = (np.array(column, dtype=np.int64) for column in zip(*requests, strict=True))
    trace = Trace.from_columns(prompts, outputs, np.arange(len(prompts), dtype=np.float64))
    pair = drawn_pair("trace", trace, count, divisor, 32_768, seed)
    assert len(pair.mixed) == len(pair.equal) == count
    assert sum(pair.mixed) == sum(pair.equal)
    assert 1 <= min(pair.mixed) <= max(pair.mixed) <= max(1, 32_768 // divisor)


def test_the_fixed_pairs_are_what_their_names_say() -> None:
    """Count and total follow from the name, e.g. 31 x 1K + 1 x 128K."""
    for pair in fixed_pairs(1, 0):
        groups = [(int(n), int(k[:-1])) for n, k in (part.split(" x ") for part in pair.name.split(" + "))]
        assert tuple(groups) == FIXED[pair.name]
        assert len(pair.mixed) == len(pair.equal) == sum(n for n, _ in groups)
        assert sum(pair.mixed) == sum(pair.equal) == 1024 * sum(n * k for n, k in groups)


def test_pages_belong_to_one_request_of_one_copy() -> None:
    """Tables hold enough pages for each length, none twice, over all copies."""
    batch = PagedBatch((1, 16, 17, 100), 40, SMALL, device="cpu", copies=3, seed=0)
    lists = [pages for copy in batch.page_lists for pages in copy]
    assert [len(pages) for pages in batch.page_lists[0]] == [1, 1, 2, 7, 3]
    pages = torch.cat(lists).tolist()
    assert sorted(pages) == list(range(3 * 14))
    assert batch.query_starts.tolist() == [0, 1, 2, 3, 4, 44]
    for table, copy in zip(batch.tables, batch.page_lists, strict=True):
        assert all(row[: len(own)].tolist() == own.tolist() for row, own in zip(table, copy, strict=True))


def dense(batch: PagedBatch, copy: int) -> torch.Tensor:
    """Attention by its definition, token by token and head by head, in float64."""
    out = torch.zeros_like(batch.q, dtype=torch.float64)
    group = batch.shape.q_heads // batch.shape.kv_heads
    for number, length in enumerate(batch.lengths):
        pages = batch.page_lists[copy][number]
        first, end = (int(at) for at in batch.query_starts[number : number + 2])
        k, v = (cache[pages].flatten(0, 1)[:length].double() for cache in (batch.k, batch.v))
        for token in range(first, end):
            seen = length - (end - 1 - token)
            for head in range(batch.shape.q_heads):
                scores = k[:seen, head // group] @ batch.q[token, head].double() * batch.scale
                out[token, head] = scores.softmax(0) @ v[:seen, head // group]
    return out


def test_plain_torch_computes_attention() -> None:
    """The reference agrees with the definition, decodes and prompt chunk, in every copy."""
    batch = PagedBatch((1, 15, 33), 9, SMALL, device="cpu", copies=2, seed=3)
    for copy, call in enumerate(plain_torch(batch)):
        torch.testing.assert_close(call().double(), dense(batch, copy), atol=2e-2, rtol=2e-2)


def test_a_kernel_that_computes_something_else_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that differs and one that cannot be called are told and left out; the check of the other is a row."""

    def wrong(batch: PagedBatch) -> list:
        return [lambda call=call: call() + 0.1 for call in plain_torch(batch)]

    def broken(_: PagedBatch) -> list:
        raise RuntimeError("no image for this device")

    kernels = [Kernel("right", plain_torch), Kernel("wrong", wrong), Kernel("broken", broken)]
    with RowLog(tmp_path / "rows.jsonl", {}) as log:
        assert [kernel.name for kernel in agreeing(kernels, SMALL, "cpu", log)] == ["right"]
        assert [row["key"].split(",")[0] for row in log.rows] == ["check right"]
    told = capsys.readouterr().err
    assert "check wrong" in told
    assert "differs from plain torch by 0.1" in told
    assert "cannot be called: RuntimeError: no image for this device" in told
    assert largest_error(Kernel("right", plain_torch), SMALL, 0, "cpu") == 0.0


def test_the_grid_on_a_processor(tmp_path: Path) -> None:
    """Every cell has a row with both times and their ratio; a second run measures nothing."""
    path = tmp_path / "rows.jsonl"
    with RowLog(path, {}) as log:
        assert measure(TINY, "cpu", log) == 0
        cells = [row for row in log.rows if "ratio" in row]
    assert len(cells) == len(TINY.prompts) * len(pairs_of(TINY))
    assert all(row.keys() >= KEYS for row in cells)
    assert all(row["ratio"] == row["mixed_us"] / row["equal_us"] for row in cells)
    assert {row["predicted"] for row in cells} == {None}
    before = path.read_bytes()
    with RowLog(path, {}) as log:
        assert measure(TINY, "cpu", log) == 0
    assert path.read_bytes() == before


def test_known_devices_are_recognised() -> None:
    """By the name that torch gives and the number of multiprocessors; slices and others are not."""
    assert {device.name for device in DEVICES} == set(DEVICE_NAMES)
    assert device_known("NVIDIA H200", 132) == "h200"
    assert device_known("NVIDIA A100-SXM4-80GB", 108) == "a100"
    assert device_known("NVIDIA L40", 142) == "l40"
    for title, multiprocessors in (("NVIDIA H200 MIG 3g.71gb", 60), ("NVIDIA H200", 60), ("NVIDIA T4", 40)):
        assert device_known(title, multiprocessors) is None


def test_predictions_are_those_of_the_data_page() -> None:
    """Mixed over equal of 31 x 1K + 1 x 128K, as simulated when the rules were collected: 1.04, 10.8, capped 2.2."""
    pair = fixed_pairs(1, 0)[0]
    shape = Shape(32, 8, 16)
    assert predicted("h100", "FA3", shape, pair, 0)["simulated"] == pytest.approx(1.04, abs=0.02)
    assert predicted("h100", "FlashInfer tensor-core", shape, pair, 0)["simulated"] == pytest.approx(10.8, abs=0.3)
    capped = predicted("h100", "FA3 graphs", Shape(8, 1, 16), pair, 0)["simulated"]
    assert capped == pytest.approx(2.2, abs=0.1)
    assert predicted("h100", "FA3 graphs", Shape(8, 1, 16), pair, 2048) == predicted(
        "h100", "FA3", Shape(8, 1, 16), pair, 2048
    )
    assert set(predicted("h100", "Triton unified", shape, pair, 0).values()) == {None}
    assert set(predicted(None, "FA3", shape, pair, 0).values()) == {None}


def test_a_prompt_beside_the_decodes_dilutes_what_mixing_costs() -> None:
    """The chunk's attention is added to both sides of the ratio."""
    pair = fixed_pairs(1, 0)[0]
    ratios = [predicted("a100", "FA2", Shape(32, 8, 16), pair, prompt)["predicted"] for prompt in (0, 512, 2048)]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3
    assert min(ratios) > 1.0


def test_only_the_rule_of_the_device_is_applied() -> None:
    """FA3's rule is not used on a device whose kernel is FA2."""
    assert kernel_model("a100", "FA3") is None
    found = kernel_model("h100", "FlashInfer")
    assert found is not None
    assert found.rule is SplitRule.FLASHINFER_CUDA_CORE


def test_the_grid_of_a_gpu_is_the_one_asked_for() -> None:
    """Both numbers of heads, both page sizes, from no prompt to 2,048 tokens, lengths as they are."""
    grid = GRIDS["cuda"]
    assert grid.heads == ((32, 8), (8, 1))
    assert grid.pages == (16, 64)
    assert (min(grid.prompts), max(grid.prompts), grid.divisor) == (0, 2048, 1)
