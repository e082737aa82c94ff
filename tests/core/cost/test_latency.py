"""The step model: its terms one by one, its split rules, and the shapes it must have for any coefficients."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import BatchFeatures, StepModel, step_time_s

LINEAR = StepModel(
    base_s=5e-3,
    per_decode_s=1e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=1e-9,
)
STRAGGLER = replace(LINEAR, straggler_per_kv_token_s=6e-7)


def test_linear_terms_add_up() -> None:
    """Without the optional coefficients a step is the sum of its linear terms."""
    batch = BatchFeatures(10, 5_000, 600, 100, 5_050.0)
    expected = 5e-3 + 10 * 1e-5 + 5_000 * 4e-8 + 100 * 2e-5 + 5_050 * 1e-9
    assert LINEAR.step_s(batch) == pytest.approx(expected, rel=1e-12)


def test_longest_request_sets_the_pace_when_it_cannot_be_split() -> None:
    """One long request among short ones is read at a thread block's rate, not at its share of the bandwidth."""
    like = STRAGGLER.step_s(BatchFeatures(32, 160_000, 5_000))
    mixed = STRAGGLER.step_s(BatchFeatures(32, 160_000, 130_000))
    assert like == pytest.approx(5e-3 + 32 * 1e-5 + 160_000 * 4e-8, rel=1e-12)
    assert mixed == pytest.approx(5e-3 + 32 * 1e-5 + 130_000 * 6e-7, rel=1e-12)


def test_one_split_count_shrinks_with_the_batch() -> None:
    """With one count for the batch the longest piece is kv_max x n / slots, and whole from the limit on."""
    model = replace(STRAGGLER, split_slots=24.0, split_until_requests=20.0, split_cap=128.0, split_s=1e-4)
    by_n = [model.step_s(BatchFeatures(n, 100_000 + n, 100_000)) - n * 1e-5 - 5e-3 for n in (2, 6, 19, 20)]
    assert by_n[0] == pytest.approx(1e-4 + 100_000 * 6e-7 / 12)
    assert by_n[1] == pytest.approx(1e-4 + 100_000 * 6e-7 / 4)
    assert by_n[2] == pytest.approx(1e-4 + 100_000 * 6e-7 * 19 / 24)
    assert by_n[3] == pytest.approx(100_000 * 6e-7)


def test_rounded_split_count_fills_its_last_wave() -> None:
    """FA2's count: 16 requests in 27 slots take 3 pieces (two full waves), not 1.7."""
    model = replace(STRAGGLER, split_slots=27.0, split_until_requests=21.6, split_cap=128.0, split_efficiency=0.833)
    attention_s = model.step_s(BatchFeatures(16, 100_015, 100_000)) - 16 * 1e-5 - 5e-3
    assert attention_s == pytest.approx(100_000 * 6e-7 / 3)


def test_common_piece_size_splits_by_share_of_the_batch() -> None:
    """With one piece size the longest piece is a share of the whole batch, until the cap on pieces binds."""
    model = replace(STRAGGLER, split_slots=60.0, split_by_share=1.0, split_until_requests=993.0, split_cap=32.0)
    even = model.step_s(BatchFeatures(100, 400_000, 4_000)) - 100 * 1e-5 - 5e-3
    skewed = model.step_s(BatchFeatures(100, 400_000, 300_000)) - 100 * 1e-5 - 5e-3
    assert even == pytest.approx(400_000 * 4e-8)
    assert skewed == pytest.approx(max(400_000 * 4e-8, 300_000 * 6e-7 / 32))


def test_equal_lengths_pay_no_overlap() -> None:
    """The late start of the longest request costs nothing if there is no longest one."""
    model = replace(STRAGGLER, overlap_max=0.5, wave_requests=16.0)
    assert model.step_s(BatchFeatures(64, 64_000, 1_000)) == STRAGGLER.step_s(BatchFeatures(64, 64_000, 1_000))
    late = model.step_s(BatchFeatures(64, 640_000, 40_000)) - STRAGGLER.step_s(BatchFeatures(64, 640_000, 40_000))
    assert late == pytest.approx(0.5 * (1 - 640_000 / (64 * 40_000)) * (1 - 16 / 64) * 40_000 * 6e-7)


def test_tokens_below_the_knee_ride_along() -> None:
    """Dense compute starts at the knee, whatever brings the tokens."""
    model = replace(LINEAR, dense_knee_tokens=256.0, per_dense_token_s=3e-5)
    assert model.step_s(BatchFeatures(200, 0, 0, 56, 0.0)) == LINEAR.step_s(BatchFeatures(200, 0, 0, 56, 0.0))
    above = model.step_s(BatchFeatures(200, 0, 0, 156, 0.0)) - LINEAR.step_s(BatchFeatures(200, 0, 0, 156, 0.0))
    assert above == pytest.approx(100 * 3e-5)
    assert model.compute_per_prefill_token_s == pytest.approx(5e-5)


def test_experts_are_read_as_they_are_picked() -> None:
    """One token of a top-8 of 128 reads a sixteenth of the experts; many tokens read them all."""
    model = replace(LINEAR, experts_s=1e-2, expert_miss=1 - 8 / 128)
    read = [model.step_s(BatchFeatures(n, 0, 0)) - LINEAR.step_s(BatchFeatures(n, 0, 0)) for n in (1, 32, 1_000)]
    assert read == pytest.approx([1e-2 / 16, 1e-2 * (1 - (15 / 16) ** 32), 1e-2])


def test_empty_step_costs_its_base() -> None:
    """An empty step has no attention and no division by zero, whatever the split rule."""
    for model in (LINEAR, replace(STRAGGLER, split_slots=8.0, split_by_share=1.0, split_until_requests=99.0)):
        assert model.step_s(BatchFeatures(0, 0, 0)) == pytest.approx(5e-3)


MODELS = st.builds(
    StepModel,
    base_s=st.floats(1e-4, 1e-1),
    per_decode_s=st.floats(0, 1e-3),
    per_kv_token_s=st.floats(1e-9, 1e-6),
    per_prefill_token_s=st.floats(0, 1e-3),
    per_prefill_attention_s=st.floats(0, 1e-7),
    straggler_per_kv_token_s=st.floats(0, 1e-5),
    dense_knee_tokens=st.floats(0, 1000),
    per_dense_token_s=st.floats(0, 1e-3),
    experts_s=st.floats(0, 1e-1),
    expert_miss=st.floats(0, 1),
    split_slots=st.floats(0, 300),
    split_by_share=st.sampled_from([0.0, 1.0]),
    split_until_requests=st.floats(0, 1000),
    split_cap=st.floats(1, 128),
    overlap_max=st.floats(0, 1),
    wave_requests=st.floats(0, 300),
    split_efficiency=st.sampled_from([0.0, 0.833]),
    split_above_tokens=st.sampled_from([0.0, 128.0, 512.0]),
)


@given(MODELS, st.lists(st.integers(1, 131_072), min_size=1, max_size=64), st.integers(0, 4_096))
def test_step_is_finite_and_never_below_its_floor(model: StepModel, lengths: list[int], prefill: int) -> None:
    """For any coefficients and batch, a step is finite, at least base plus balanced read, and grows with prefill."""
    batch = BatchFeatures(len(lengths), sum(lengths), max(lengths), prefill, prefill * (prefill + 1) / 2)
    step = model.step_s(batch)
    assert np.isfinite(step)
    assert step >= (model.base_s + model.per_kv_token_s * sum(lengths)) * (1 - 1e-12)
    more = replace(batch, prefill_tokens=prefill + 100, prefill_attention_tokens=(prefill + 100) ** 2)
    assert model.step_s(more) >= step


@given(MODELS, st.lists(st.integers(1, 131_072), min_size=2, max_size=64))
def test_mixing_lengths_never_helps(model: StepModel, lengths: list[int]) -> None:
    """At the same count and total, a longer longest request never helps (partial waves and splits apart)."""
    model = replace(model, overlap_max=0.0, split_s=0.0, split_above_tokens=0.0)
    mean = -(-sum(lengths) // len(lengths))
    like = model.step_s(BatchFeatures(len(lengths), sum(lengths), mean))
    mixed = model.step_s(BatchFeatures(len(lengths), sum(lengths), max([*lengths, mean])))
    assert mixed >= like * (1 - 1e-9)


def test_partial_last_wave_of_equal_lengths_is_paid() -> None:
    """32 equal requests in waves of 27 pay for the five that remain; 27 and 54 fill their waves."""
    model = replace(STRAGGLER, overlap_max=0.5, wave_requests=27.0)
    extra = {
        n: model.step_s(BatchFeatures(n, n * 8_000, 8_000)) - STRAGGLER.step_s(BatchFeatures(n, n * 8_000, 8_000))
        for n in (27, 32, 54)
    }
    assert extra[27] == extra[54] == 0.0
    assert extra[32] == pytest.approx(8_000 * 6e-7 - 5 * 8_000 * 4e-8)


def test_coefficients_are_the_fields_in_order() -> None:
    """The compiled form takes what `coefficients` returns."""
    coefficients = STRAGGLER.coefficients()
    assert coefficients.shape == (25,)
    assert step_time_s(coefficients, 3.0, 900.0, 500.0, 0.0, 0.0) == STRAGGLER.step_s(BatchFeatures(3, 900, 500))


FA2_LIKE = replace(STRAGGLER, mixed_split_tokens=0.0, mixed_share_per_request=0.15, mixed_overlap=1.0)
FA3_LIKE = replace(
    STRAGGLER,
    split_slots=60.0,
    split_by_share=1.0,
    split_until_requests=993.0,
    split_cap=32.0,
    mixed_split_tokens=512.0,
    mixed_fill_tokens=528.0,
)


def attention_s(model: StepModel, batch: BatchFeatures) -> float:
    """A step's time without its base, per-request and per-prompt-token parts."""
    return model.step_s(batch) - model.base_s - model.per_decode_s * batch.n_decode - 2e-5 * batch.prefill_tokens


def test_longest_request_hides_or_is_hidden_by_the_rest_of_a_call() -> None:
    """Beside a large prompt nothing is split; the call takes as long as the longer of the request and all else."""
    batch = BatchFeatures(16, 150_000, 60_000, 900, 900 * 901 / 2)
    work_s = 150_000 * 4e-8 + 1e-9 * 900 * 901 / 2
    assert attention_s(FA3_LIKE, batch) == pytest.approx(60_000 * 6e-7)
    late = replace(batch, prefill_attention_tokens=1e8)
    assert attention_s(FA3_LIKE, late) == pytest.approx(150_000 * 4e-8 + 1e8 * 1e-9)
    small = replace(batch, prefill_tokens=490)
    assert attention_s(FA3_LIKE, small) == pytest.approx(work_s)


def test_a_prompt_that_leaves_room_leaves_splits() -> None:
    """Above the limit of graphs a prompt with a third of the blocks leaves three pieces; with 0.8 of them, one."""
    model = replace(FA3_LIKE, mixed_split_tokens=0.0)
    thirds = BatchFeatures(2, 100_100, 100_000, 176, 0.0)
    assert attention_s(model, thirds) == pytest.approx(100_000 * 6e-7 / 3)
    assert attention_s(model, replace(thirds, prefill_tokens=423)) == pytest.approx(100_000 * 6e-7)
    assert attention_s(model, replace(thirds, prefill_tokens=0)) == pytest.approx(100_100 * 4e-8)


def test_blocks_per_query_head_limit_the_reading() -> None:
    """Where each request takes 0.15 of the blocks, 100 like ones take 15 turns, and an unlike one's time adds."""
    like = BatchFeatures(100, 400_000, 4_000, 64, 0.0)
    assert attention_s(FA2_LIKE, like) == pytest.approx(0.15 * 400_000 * 6e-7)
    mixed = replace(like, decode_kv_tokens_max=100_000)
    expected = 0.15 * 400_000 * 6e-7 + (1.0 - 400_000 / (100 * 100_000)) * 0.15 * 400_000 * 6e-7
    assert attention_s(FA2_LIKE, mixed) == pytest.approx(max(expected, 100_000 * 6e-7 + 0.96 * 0.15 * 400_000 * 6e-7))
    assert attention_s(FA2_LIKE, replace(mixed, prefill_tokens=0)) == pytest.approx(100_000 * 6e-7)


@given(MODELS, st.lists(st.integers(1, 131_072), min_size=1, max_size=64), st.integers(1, 4_096))
def test_without_the_coefficients_there_is_no_rule(model: StepModel, lengths: list[int], prefill: int) -> None:
    """A model without coefficients for mixed steps adds the prompt's attention to the decodes', as ever."""
    decode = BatchFeatures(len(lengths), sum(lengths), max(lengths))
    both = replace(decode, prefill_tokens=prefill, prefill_attention_tokens=1e6)
    tokens = replace(both, prefill_attention_tokens=0.0)
    quiet = replace(model, per_prefill_token_s=0.0, per_dense_token_s=0.0, experts_s=0.0)
    assert quiet.step_s(both) - quiet.step_s(tokens) == pytest.approx(1e6 * model.per_prefill_attention_s, abs=1e-9)
    assert quiet.step_s(tokens) == pytest.approx(quiet.step_s(decode), abs=1e-9)


@given(
    MODELS,
    st.lists(st.integers(1, 131_072), min_size=1, max_size=64),
    st.integers(1, 4_096),
    st.sampled_from([0.0, 512.0]),
    st.floats(0, 1_000),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_call_takes_no_less_than_each_of_its_parts(
    model: StepModel, lengths: list[int], prefill: int, until: float, fill: float, share: float, overlap: float
) -> None:
    """With any rule the attention of a mixed step is finite and no shorter than the prompt's or the KV at bandwidth."""
    ruled = replace(
        model,
        mixed_split_tokens=until,
        mixed_fill_tokens=fill,
        mixed_share_per_request=share,
        mixed_overlap=overlap,
    )
    batch = BatchFeatures(len(lengths), sum(lengths), max(lengths), prefill, 5.0 * prefill**2)
    step_s = ruled.step_s(batch)
    assert np.isfinite(step_s)
    least_s = model.per_kv_token_s * sum(lengths) + model.per_prefill_attention_s * batch.prefill_attention_tokens
    assert step_s >= (model.base_s + least_s) * (1 - 1e-12)


def test_what_is_hidden_is_the_shorter_of_two() -> None:
    """With full overlap a mixed step takes the longer of the decodes' attention and the prompts' part."""
    model = replace(LINEAR, mixed_hidden=1.0, dense_knee_tokens=50.0, per_dense_token_s=3e-5)
    prompts_s = 60 * 3e-5 + 100 * 2e-5 + 5_050 * 1e-9
    for kv_tokens in (20_000, 200_000):
        batch = BatchFeatures(10, kv_tokens, 20_000, 100, 5_050.0)
        longer_s = max(kv_tokens * 4e-8, prompts_s)
        assert model.step_s(batch) == pytest.approx(5e-3 + 10 * 1e-5 + longer_s, rel=1e-12)
    alone = BatchFeatures(10, 20_000, 20_000)
    assert model.step_s(alone) == LINEAR.step_s(alone)
