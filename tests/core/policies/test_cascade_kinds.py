"""The cascade with instances of several kinds: who takes what, what is learnt from whom, what is planned with."""

from dataclasses import replace

import numpy as np
import pytest

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.effects import MigrationReason, PublishLayout, StartMigration
from cascadeinfer.core.events import InstanceReport, InstanceReported, RequestFinished
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from support.policy_world import LARGE, SMALL, World

MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=6e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
SLOW = StepModel(*(4.0 * MODEL.coefficients()).tolist())


def timed_steps(model: StepModel, n: int, seed: int) -> tuple[StepSample, ...]:
    """Steps that take what the model says."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        lengths = rng.integers(50, 3000, int(rng.integers(1, 30)))
        prefill = int(rng.integers(20, 500)) if number % 4 == 0 else 0
        batch = BatchFeatures(
            len(lengths), int(lengths.sum()), int(lengths.max()), prefill, prefill * (prefill + 1) / 2
        )
        found.append(StepSample(batch, model.step_s(batch)))
    return tuple(found)


def cascade_of(world: World) -> Cascade:
    """Its policy."""
    assert isinstance(world.policy, Cascade)
    return world.policy


def report_steps(world: World, truth: dict[str, StepModel], seed: int) -> None:
    """Each instance reports steps that took what its model says."""
    for instance_id, model in truth.items():
        steps = timed_steps(model, 100, seed)
        world.emit(InstanceReported("steps", instance_id, InstanceReport((), (), (), (), 0, 0.01, steps)))


def feed(world: World, n: int) -> None:
    """So many requests come and end, with reports on the way."""
    for number in range(n):
        world.arrive(f"r{number}", 8000 if number % 10 == 0 else 100)
        world.advance(0.02)
        world.report("a")
        del world.requests[f"r{number}"]
        world.emit(RequestFinished("end", f"r{number}", 200))


def test_each_kind_is_learnt_and_priced_by_its_own_steps() -> None:
    """Two kinds learn a model each from nothing; the slow kind then costs more, though none lags its own kind."""
    kinds = {i: InstanceKind(LARGE, "slow") for i in ("c", "d")}
    world = World(Cascade(learning=LearningSettings(interval_s=2.0), replan=False), LARGE, kinds=kinds)
    world.join("a", "b", "c", "d")
    view = cascade_of(world).view
    for seed in range(40):
        report_steps(world, {"a": MODEL, "b": MODEL, "c": SLOW, "d": SLOW}, seed)
        world.advance(0.5)
    fast, slow = view.instances["a"], view.instances["c"]
    assert (fast.slowness, fast.lag, slow.slowness, slow.lag) == (1.0, 1.0, 1.0, 1.0)
    assert fast.pricing.base == pytest.approx(MODEL.base_s, rel=0.05)
    assert slow.pricing.base == pytest.approx(SLOW.base_s, rel=0.05)
    assert slow.price == pytest.approx(4.0 * fast.price, rel=0.05)


def test_prices_keep_one_unit_when_an_unknown_kind_joins() -> None:
    """While an instance without a model is there, prices are proportions; they are seconds again when it has gone."""
    world = World(Cascade(step_model=MODEL), LARGE, kinds={"b": InstanceKind(LARGE, "unknown")})
    world.join("a")
    home = cascade_of(world).view.instances["a"]
    in_seconds = home.price
    assert in_seconds == pytest.approx(MODEL.base_s)
    world.join("b")
    assert home.price == cascade_of(world).view.instances["b"].price == 1.0
    world.lose("b")
    assert home.price == in_seconds


def test_a_draining_instance_empties_into_a_stage_that_holds_its_requests() -> None:
    """A request whose own stage is too small for it is offered to the nearest stage that is not, at once."""
    half = replace(SMALL, kv_blocks=128)
    layout = StageLayout.from_boundaries((200,), (("a",), ("b", "c")))
    world = World(Cascade(layout=layout), SMALL, kinds={"a": InstanceKind(half)})
    world.join("a", "b")
    world.arrive("r", 100, 3000)
    assert world.requests["r"].instance_id == "b"
    world.join("c")
    world.report("b")
    world.grow("b", 5)
    world.report("b")
    world.drain("b")
    world.deliver_all()
    world.report("b")
    moves = [effect for effect in world.log if isinstance(effect, StartMigration)]
    assert [(move.target_id, move.reason) for move in moves] == [("c", MigrationReason.DRAIN)]


def test_an_overloaded_instance_offers_what_a_peer_could_hold() -> None:
    """A request that only the overloaded instance could hold is passed over, even if it would halve the gap best."""
    half = replace(SMALL, kv_blocks=128)
    world = World(Cascade(), SMALL, kinds={"b": InstanceKind(half)})
    world.join("a")
    world.arrive("only-here", 500, 3000)
    world.arrive("anywhere", 600, 100)
    world.arrive("large", 1000, 3000)
    world.join("b")
    for _ in range(3):
        for instance_id in ("b", "a"):
            world.grow(instance_id, 1)
            world.report(instance_id)
            world.deliver_all()
        world.advance(1.0)
    moves = [effect for effect in world.log if isinstance(effect, StartMigration)]
    assert [move.request_id for move in moves] == ["anywhere"]


def test_a_plan_is_made_with_the_weakest_kind() -> None:
    """The planner is told the smallest capacity of the instances that are there, whichever comes first."""
    asked = []

    def planner(*arguments: object) -> StageLayout | None:
        asked.append(arguments[2])
        return None

    half = replace(LARGE, kv_blocks=LARGE.kv_blocks // 2)
    planning = PlanSettings(interval_s=1.0, min_requests=10, most_unknown=1.0)
    world = World(Cascade(planner=planner, planning=planning), LARGE, kinds={"b": InstanceKind(half)})
    world.join("a", "b", "c")
    feed(world, 120)
    assert asked
    assert set(asked) == {half}


def test_a_kind_without_a_model_is_told_when_a_plan_is_due() -> None:
    """The layout is published unchanged and names the missing key; no kind is planned with another kind's model."""
    planning = PlanSettings(interval_s=1.0, min_requests=10, most_unknown=1.0)
    kinds = {"b": InstanceKind(LARGE, "h100, tp 2")}
    world = World(Cascade(step_model=MODEL, planning=planning), LARGE, kinds=kinds)
    world.join("a", "b", "c")
    feed(world, 120)
    failures = [effect for effect in world.log if isinstance(effect, PublishLayout) and effect.failure]
    assert failures
    assert "no step model for the instances of 'h100, tp 2'" in failures[0].failure
    assert failures[0].layout == StageLayout.single(("a", "b", "c"))


def test_boundaries_move_between_stages_of_different_kinds() -> None:
    """Refinement weighs each stage at its own cost: a slow stage gives requests away that an equal stage would keep."""

    def boundary(slow_key: str) -> int:
        layout = StageLayout.from_boundaries((2500,), (("a",), ("b",)))
        policy = Cascade(layout=layout, step_model=MODEL, step_models={"slow": SLOW}, replan=False)
        world = World(policy, LARGE, kinds={"b": InstanceKind(LARGE, slow_key)})
        world.join("a", "b")
        rng = np.random.default_rng(0)
        for number, prompt in enumerate(rng.integers(50, 4000, 400).tolist()):
            world.arrive(f"r{number}", prompt)
            world.advance(0.3)
            world.report("a")
            del world.requests[f"r{number}"]
            world.emit(RequestFinished("end", f"r{number}", 50))
        return policy.roster.boundaries_tokens[0]

    assert boundary("slow") > 3000 > boundary("") > 2500
