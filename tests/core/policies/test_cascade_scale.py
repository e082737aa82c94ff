"""The cascade advises how many instances the load needs, if it is given an SLO."""

import itertools

import pytest

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import AdviseScale
from cascadeinfer.core.events import SeenEnd, WorkloadSeen
from cascadeinfer.core.plan.scale import ServiceLevel
from cascadeinfer.core.policies.cascade import Cascade
from support.policy_world import LARGE, World

MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=6e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
LEVEL = ServiceLevel(ttft_s=1.0, tpot_s=0.05)


def advised(level: ServiceLevel | None, model: StepModel | None, arrivals: list[int]) -> list[int | None]:
    """What is advised over seconds in each of which so many requests of another process arrive, and ten end."""
    settings = PlanSettings(interval_s=1.0, memory_s=5.0, min_requests=5, most_unknown=1.0, service_level=level)
    world = World(Cascade(step_model=model, planning=settings, refine=False), LARGE)
    world.join("a", "b")
    for n_arrived in arrivals:
        world.emit(WorkloadSeen("seen", "1", n_arrived, (SeenEnd(500, 200, world.now_s),) * 10, ()))
        world.advance(1.0)
        world.report("a")
        world.report("b")
    return [effect.n_instances for effect in world.log if isinstance(effect, AdviseScale)]


def test_the_advice_follows_the_load() -> None:
    """Nothing at first; then a number that grows with the arrivals and falls when they cease; only when it changes."""
    found = advised(LEVEL, MODEL, [10] * 6 + [2000] * 6 + [0] * 40)
    numbers = [number for number in found if number is not None]
    assert numbers == found
    assert numbers[0] == 1
    assert max(numbers) > 4
    assert numbers[-1] < max(numbers)
    assert all(before != after for before, after in itertools.pairwise(numbers))


@pytest.mark.parametrize(("level", "model"), [(None, MODEL), (LEVEL, None)])
def test_no_advice_without_slo_or_costs(level: ServiceLevel | None, model: StepModel | None) -> None:
    """Without an SLO, or without a step model, nothing is advised."""
    assert advised(level, model, [50] * 6) == []


def test_an_slo_that_no_number_keeps_is_told_once() -> None:
    """None, once."""
    assert advised(ServiceLevel(1.0, 0.001), MODEL, [50] * 6) == [None]
