"""Boundaries follow a drifting workload, stand still on a steady one, and never empty a range."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.adapt.boundaries import BoundaryRefiner, Neighbours, RefineSettings, outlook
from cascadeinfer.core.adapt.recent import RecentWorkload
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.types import InstanceCapacity

CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=512, max_batched_tokens=8192)
MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=6e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
INSTANCES = (3, 5)
SETTINGS = RefineSettings()


def requests(rng: np.random.Generator, n: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and outputs of a mixed workload, with all lengths times `scale`."""
    prompts = np.maximum(1, scale * rng.lognormal(6.0, 1.2, n)).astype(int)
    outputs = np.maximum(1, scale * rng.lognormal(5.0, 0.8, n)).astype(int)
    return np.minimum(prompts, 60_000), np.minimum(outputs, 20_000)


def problem_of(histogram: LengthHistogram, rate_per_s: float) -> PlanProblem:
    """The workload on the eight instances."""
    return PlanProblem(histogram, MODEL, CAPACITY, rate_per_s, sum(INSTANCES))


def cost_of(scale: float, rate_per_s: float, boundary_tokens: int) -> float:
    """Predicted cost of two stages for the true workload."""
    histogram = LengthHistogram.from_requests(*requests(np.random.default_rng(99), 20_000, scale))
    problem = problem_of(histogram, rate_per_s)
    edge = histogram.nearest_edge(boundary_tokens)
    last = len(problem.edges) - 1
    return problem.service(0, edge, INSTANCES[0]).cost + problem.service(edge, last, INSTANCES[1]).cost


def best_boundary(scale: float, rate_per_s: float) -> int:
    """The boundary with the lowest predicted cost."""
    candidates = [int(64 * 1.07**k) for k in range(100)]
    return min(candidates, key=lambda boundary: cost_of(scale, rate_per_s, boundary))


def follow(boundary: int, scales: list[float], rate_per_s: float, seed: int = 0) -> list[int]:
    """
    A closed loop without instances: in each interval requests come and go as a fluid, and the boundary is refined.

    Args:
        boundary: Boundary at the start.
        scales: Scale of the lengths, per interval.
        rate_per_s: Requests per second.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    recent = RecentWorkload(SETTINGS.memory_s, 1 << 20)
    refiner = BoundaryRefiner(SETTINGS)
    path: list[int] = []
    for interval, scale in enumerate(scales):
        now_s = interval * SETTINGS.interval_s
        n = int(rng.poisson(rate_per_s * SETTINGS.interval_s))
        for prompt, output in zip(*requests(rng, n, scale), strict=True):
            recent.note_arrival(now_s)
            recent.note_finished(int(prompt), int(output), now_s)
        seen = recent.look(now_s + SETTINGS.interval_s, SETTINGS.min_requests)
        around = Neighbours(0, None, 0.4, 0.5)
        gain_of = None if seen is None else outlook((problem_of(*seen),) * 2, boundary, around, INSTANCES)
        if gain_of is not None:
            boundary = refiner.step(boundary, around, gain_of)
        path.append(boundary)
    return path


def test_steady_workload_stands_still() -> None:
    """Starting at the best boundary, a steady workload moves it by at most 15 %, and hardly ever."""
    best = best_boundary(1.0, 30.0)
    path = follow(best, [1.0] * 150, 30.0)
    assert all(best / 1.15 <= boundary <= best * 1.15 for boundary in path)
    assert sum(a != b for a, b in pairwise(path[50:])) <= 10


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_wrong_boundary_is_mended(factor: float) -> None:
    """Starting at three times too low or too high, it comes within 2 % of the lowest cost, in steps of 5 %."""
    best = best_boundary(1.0, 30.0)
    start = int(best * factor)
    path = follow(start, [1.0] * 150, 30.0)
    assert cost_of(1.0, 30.0, start) > 1.03 * cost_of(1.0, 30.0, best)
    assert cost_of(1.0, 30.0, path[-1]) < 1.02 * cost_of(1.0, 30.0, best)
    steps = [abs(math.log(b / a)) for a, b in zip([start, *path], path, strict=False)]
    assert max(steps) < 1.1 * SETTINGS.step


def test_drifting_workload_is_followed() -> None:
    """When all lengths grow fourfold in eight minutes, the boundary keeps up: its cost is within 4 % of the lowest."""
    rate_per_s = 14.0
    scales = [4.0 ** min(1.0, interval / 200) for interval in range(240)]
    start = best_boundary(1.0, rate_per_s)
    path = follow(start, scales, rate_per_s)
    lowest = cost_of(4.0, rate_per_s, best_boundary(4.0, rate_per_s))
    assert cost_of(4.0, rate_per_s, start) > 1.08 * lowest, "the workload must matter, or following it proves nothing"
    assert cost_of(4.0, rate_per_s, path[-1]) < 1.04 * lowest


def balance(boundary: int, steps: int, *, spread: float = 0.0) -> list[int]:
    """
    A closed loop without a cost model: loads are the work below and above the boundary, uniform in log length up to
    16K.
    """
    rng = np.random.default_rng(1)
    refiner = BoundaryRefiner(SETTINGS)
    path: list[int] = []
    for _ in range(steps):
        lower_load = 0.5 * math.log(boundary) / math.log(128) * math.exp(spread * rng.standard_normal())
        upper_load = 0.5 * math.log(16_384 / boundary) / math.log(128) * math.exp(spread * rng.standard_normal())
        boundary = refiner.step(boundary, Neighbours(0, None, lower_load, upper_load), None)
        path.append(boundary)
    return path


def test_without_a_model_loads_are_balanced() -> None:
    """The boundary settles where both sides are equally full, and stays there even if loads are noisy."""
    for start in (40, 6000):
        path = balance(start, 300)
        assert 128 / 1.9 < path[-1] < 128 * 1.9
        assert len(set(path[-50:])) == 1
    noisy = balance(128, 400, spread=0.15)
    assert max(noisy) / min(noisy) < 1.8


def test_idle_stages_stand_still() -> None:
    """Without a load to balance, nothing moves."""
    refiner = BoundaryRefiner(SETTINGS)
    assert all(refiner.step(500, Neighbours(0, None, 0.0, 0.2), None) == 500 for _ in range(50))


def test_pressure_beats_the_outlook() -> None:
    """A nearly full side gives, whatever the prediction says; if both are, the prediction decides."""

    def never(_: int) -> float:
        return 0.0

    refiner = BoundaryRefiner(SETTINGS)
    assert refiner.step(1000, Neighbours(0, None, 0.95, 0.5), never) < 1000
    refiner = BoundaryRefiner(SETTINGS)
    assert refiner.step(1000, Neighbours(0, None, 0.5, 0.95), never) > 1000
    refiner = BoundaryRefiner(SETTINGS)
    assert refiner.step(1000, Neighbours(0, None, 0.9, 0.95), never) == 1000


@given(
    low=st.integers(0, 5000),
    width=st.integers(1, 5000),
    loads=st.lists(st.tuples(st.floats(0, 1.5), st.floats(0, 1.5)), max_size=30),
)
def test_ranges_never_get_empty(low: int, width: int, loads: list[tuple[float, float]]) -> None:
    """The boundary stays between its neighbours, and moves outwards only from one to which it is too close."""
    boundary, high = low + width, low + 2 * width
    refiner = BoundaryRefiner(SETTINGS)
    for lower, upper in loads:
        after = refiner.step(boundary, Neighbours(low, high, lower, upper), None)
        assert low < after < high
        assert abs(math.log(after / boundary)) <= SETTINGS.step + math.log1p(1.0 / min(after, boundary)) + 1e-9
        if after != boundary:
            assert after >= SETTINGS.spacing * low or after > boundary
            assert after * SETTINGS.spacing <= high + 1 or after < boundary
        boundary = after


def test_outlook_of_the_impossible() -> None:
    """Over a boundary that cannot carry the load, one that can gains everything; beyond neighbours there is no gain."""
    histogram = LengthHistogram.from_requests([100] * 50 + [20_000] * 50, [100] * 100)
    around = Neighbours(0, None, 0.5, 0.5)
    gain_of = outlook((problem_of(histogram, 12.0),) * 2, 30_000, around, (1, 7))
    assert gain_of(30_000) == 0.0
    assert gain_of(1000) == 1.0
    assert gain_of(0) == 0.0
