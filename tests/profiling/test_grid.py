"""The grid of batches: those that fit, from the smallest to the largest, whatever the engine's capacity."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.profiling.grid import DECODE_STEPS, FULL_SHARE, Room, make_grid

ROOMS = st.builds(
    Room,
    st.builds(
        InstanceCapacity,
        kv_blocks=st.integers(60, 60_000),
        block_size_tokens=st.sampled_from([16, 32, 128]),
        max_num_seqs=st.integers(4, 1024),
        max_batched_tokens=st.integers(64, 16_384),
    ),
    st.integers(256, 131_072),
)


@given(ROOMS)
def test_every_batch_fits(room: Room) -> None:
    """No batch exceeds the engine's requests, sequence length, or KV blocks, counting all of its output tokens."""
    for kind in make_grid(room):
        output = room.output_tokens(kind)
        assert output > DECODE_STEPS
        assert len(kind.lengths) + bool(kind.prompts) <= room.capacity.max_num_seqs
        assert all(length + output <= room.max_model_tokens for length in kind.lengths)
        assert all(tokens < room.max_model_tokens for tokens in kind.prompts)
        blocks = sum(room.capacity.blocks_for(length + output) for length in kind.lengths)
        blocks += max((room.capacity.blocks_for(tokens + 1) for tokens in kind.prompts), default=0)
        assert blocks <= FULL_SHARE * room.capacity.kv_blocks


@given(ROOMS)
def test_grid_is_ordered_and_named(room: Room) -> None:
    """The least work comes first, names are unique, and estimates of the steps are positive."""
    grid = make_grid(room)
    assert [kind.work_tokens for kind in grid] == sorted(kind.work_tokens for kind in grid)
    assert len({kind.name for kind in grid}) == len(grid)
    for kind in grid:
        assert sum(count for _, count in room.steps(kind)) > 0


def test_a_large_engine_gets_a_wide_grid() -> None:
    """On an engine with 432K tokens, 256 requests and 128K context the grid reaches all three, and has all families."""
    room = Room(InstanceCapacity(27_000, 16, 256, 8_192), 131_072)
    grid = make_grid(room)
    assert {kind.family for kind in grid} == {"decode", "mixed", "prompt", "both"}
    assert max(len(kind.lengths) for kind in grid) == 256
    assert max(max(kind.lengths, default=0) for kind in grid) > 60_000
    assert max(sum(kind.lengths) for kind in grid) > 0.7 * room.capacity.kv_tokens
    assert max(max(kind.prompts, default=0) for kind in grid) > 130_000
    assert 40 < len(grid) < 120


def test_long_requests_decode_beside_prompts_of_both_kinds() -> None:
    """Batches with one long request have prompts below and above 512 tokens beside them, from few decodes to many."""
    room = Room(InstanceCapacity(27_000, 16, 256, 8_192), 131_072)
    beside = [kind for kind in make_grid(room) if kind.prompts and len(set(kind.lengths)) > 1]
    assert [len(kind.lengths) for kind in beside] == [4, 12, 48, 192]
    for kind in beside:
        assert max(kind.lengths) > 16_384
        assert [size + len(kind.lengths) <= 512 for size in kind.prompts].count(True) >= 1
        assert [size > 512 for size in kind.prompts].count(True) == 2


def test_prompts_lie_around_any_knee() -> None:
    """Up to the token budget no two neighbouring sizes of prompts alone differ by more than a half, from 16 on."""
    grid = make_grid(Room(InstanceCapacity(27_000, 16, 256, 8_192), 131_072))
    sizes = sorted(kind.prompts[0] for kind in grid if kind.family == "prompt" and kind.prompts[0] <= 8_192)
    assert (sizes[0], sizes[-1]) == (16, 8_192)
    assert all(larger <= 1.5 * smaller for smaller, larger in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("capacity", "max_model_tokens"),
    [(InstanceCapacity(4, 16, 16, 512), 4096), (InstanceCapacity(4000, 16, 16, 512), 48)],
)
def test_an_engine_that_holds_nothing_is_refused(capacity: InstanceCapacity, max_model_tokens: int) -> None:
    """If not even a few batches fit, there is no profile, and the error names the options that give room."""
    with pytest.raises(ConfigError, match=r"--max-model-len.*kinds of batch fit"):
        make_grid(Room(capacity, max_model_tokens))
