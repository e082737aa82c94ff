"""How many instances a load needs: the fewest that keep the SLO, with hysteresis in the load."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.adapt.scaling import ScaleAdvisor
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.plan.objective import SloAttainment
from cascadeinfer.core.plan.planner import lowest_cost
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.scale import ServiceLevel, desired_instances, fewest
from cascadeinfer.core.types import InstanceCapacity

CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=1024, max_batched_tokens=8192)
MODEL = StepModel(
    base_s=0.007,
    per_decode_s=1.2e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=7e-10,
)
RNG = np.random.default_rng(1)
WORKLOAD = LengthHistogram.from_requests(RNG.integers(100, 2000, 500), RNG.integers(50, 250, 500))
LEVEL = ServiceLevel(ttft_s=1.0, tpot_s=0.03)
MOST = 64


def problem(rate_per_s: float, n_instances: int = 4) -> PlanProblem:
    """The workload at this rate."""
    return PlanProblem(WORKLOAD, MODEL, CAPACITY, rate_per_s, n_instances, max_stages=2)


def misses(rate_per_s: float, n_instances: int) -> float:
    """The predicted share of requests that miss the SLO."""
    objective = SloAttainment(LEVEL.ttft_s, LEVEL.tpot_s)
    return lowest_cost(replace(problem(rate_per_s, n_instances), objective=objective))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_the_fewest_are_found_from_anywhere(threshold: int, near: int, most: int) -> None:
    """From any first guess: the smallest number that is enough, or None beyond the most; in few questions."""
    asked: list[int] = []

    def is_enough(n: int) -> bool:
        asked.append(n)
        assert 1 <= n <= most
        return n >= threshold

    assert fewest(is_enough, near, most) == (threshold if threshold <= most else None)
    assert len(asked) <= 2 * most.bit_length() + 2


@pytest.mark.parametrize("rate_per_s", [1.0, 20.0, 60.0])
def test_one_instance_fewer_would_miss_the_slo(rate_per_s: float) -> None:
    """The number keeps the SLO by the planner's own prediction, and one instance fewer does not."""
    wanted = desired_instances(problem(rate_per_s), LEVEL, None, MOST)
    assert wanted is not None
    assert misses(rate_per_s, wanted) <= 1.0 - LEVEL.attainment
    assert wanted == 1 or misses(rate_per_s, wanted - 1) > 1.0 - LEVEL.attainment


def test_more_load_needs_more_instances() -> None:
    """The number grows with the rate."""
    wanted = [desired_instances(problem(rate), LEVEL, None, MOST) or 0 for rate in (5.0, 40.0, 120.0)]
    assert wanted == sorted(wanted)
    assert wanted[0] < wanted[-1]


def test_growth_is_followed_at_once_and_decline_only_beyond_the_headroom() -> None:
    """A load that swings by less than the headroom changes nothing once; one that halves frees instances."""
    level = replace(LEVEL, headroom=0.3)
    low = 60.0
    before = desired_instances(problem(low), level, None, MOST)
    assert before is not None
    high = next(rate for rate in np.arange(low, 3 * low, 0.5) if (misses(rate, before) > 1.0 - level.attainment))
    grown = desired_instances(problem(high), level, before, MOST)
    assert grown is not None
    assert grown > before
    assert desired_instances(problem(high / 1.05), level, grown, MOST) == grown
    assert desired_instances(problem(high / 1.05), level, None, MOST) == before
    assert (desired_instances(problem(low / 4), level, grown, MOST) or MOST) < before


def test_an_slo_that_no_number_keeps() -> None:
    """A time per token below that of an empty step cannot be reached with any number of instances."""
    assert desired_instances(problem(5.0), ServiceLevel(1.0, 0.001), None, MOST) is None


def test_advice_is_given_once() -> None:
    """The advisor speaks when the number changes, says why, and says when no number would do."""
    advisor = ScaleAdvisor(LEVEL)
    first = advisor.advise(problem(20.0))
    assert first is not None
    assert first.n_instances is not None
    assert "20 requests/s" in first.why
    assert "95 % within TTFT 1 s and TPOT 0.03 s" in first.why
    assert advisor.advise(problem(20.0)) is None
    more = advisor.advise(problem(200.0))
    assert more is not None
    assert more.n_instances is not None
    assert more.n_instances > first.n_instances
    hopeless = ScaleAdvisor(ServiceLevel(1.0, 0.001))
    told = hopeless.advise(problem(20.0))
    assert told is not None
    assert told.n_instances is None
    assert hopeless.advise(problem(21.0)) is None


@pytest.mark.parametrize(
    "wrong", [{"ttft_s": 0.0}, {"tpot_s": -1.0}, {"attainment": 1.0}, {"attainment": 0.0}, {"headroom": -0.1}]
)
def test_impossible_levels_are_refused(wrong: dict[str, float]) -> None:
    """Limits, shares and headroom out of range are errors."""
    with pytest.raises(PlanError):
        replace(LEVEL, **wrong)
