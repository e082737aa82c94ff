"""The cascade as a whole: dispatch by stage, spilling, queueing, planning, ablations."""

from dataclasses import replace

import numpy as np
import pytest

from cascadeinfer.core.adapt.replanning import ModelPlanner, PlanSettings, Replanner
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.effects import Dispatch, PublishLayout, Reject, SendMessage, StartMigration
from cascadeinfer.core.events import (
    InstanceReport,
    InstanceReported,
    LayoutAnnounced,
    MigrationOutcome,
    RequestFinished,
    SeenEnd,
    SeenLive,
    WorkloadSeen,
)
from cascadeinfer.core.layout import Proposal, StageLayout
from cascadeinfer.core.plan.problem import ServiceFloor
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from support.policy_world import LARGE, World

TIGHT = InstanceCapacity(kv_blocks=256, block_size_tokens=16, max_num_seqs=2, max_batched_tokens=512)
LAYOUT = StageLayout.from_boundaries((100, 1000), (("a",), ("b",), ("c",)))
MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=6e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
MIXED = LengthHistogram.from_requests([100] * 900 + [8000] * 100, [200] * 900 + [400] * 100)
ALIKE = LengthHistogram.from_requests([300] * 1000, [200] * 1000)


def staged(capacity: InstanceCapacity = LARGE, **options: object) -> World:
    """Three stages of one instance each."""
    world = World(Cascade(layout=LAYOUT, **options), capacity, may_hold_back="max_queued" in options)
    world.join("a", "b", "c")
    return world


def place(world: World, request_id: str) -> str | None:
    """Where a request is."""
    return world.requests[request_id].instance_id


def test_prompts_go_to_their_stage() -> None:
    """The range is half-open: a prompt of exactly the boundary belongs to the longer stage."""
    world = staged()
    for prompt in (99, 100, 999, 1000):
        world.arrive(f"r{prompt}", prompt)
    assert [place(world, f"r{prompt}") for prompt in (99, 100, 999, 1000)] == ["a", "b", "b", "c"]


def test_a_full_stage_spills_over_to_the_longer_neighbour_first() -> None:
    """Home first, then one up, one down, and farther ones; if all are full, the home stage's engine queues."""
    world = staged(TIGHT)
    for number in range(7):
        world.arrive(f"r{number}", 500)
    assert [place(world, f"r{number}") for number in range(7)] == ["b", "b", "c", "c", "a", "a", "b"]


def test_bounded_queue_refuses_beyond_it() -> None:
    """With `max_queued`, requests wait here for room; beyond it they are refused, with the time to retry after."""
    world = staged(TIGHT, max_queued=1, retry_after_s=2.5)
    for number in range(8):
        world.arrive(f"r{number}", 50)
    refused = [effect for effect in world.log if isinstance(effect, Reject)]
    assert [(r.request_id, r.retry_after_s) for r in refused] == [("r7", 2.5)]
    assert place(world, "r6") is None
    world.finish("r0")
    assert place(world, "r6") == "a"


def test_a_long_request_does_not_hold_up_the_short() -> None:
    """A request that waits for room of its size does not hold up requests of other stages that fit."""
    world = staged(max_queued=5)
    for number in range(3):
        world.arrive(f"long{number}", 390_000)
    world.arrive("stuck", 200_000)
    world.arrive("short", 50)
    assert place(world, "stuck") is None
    assert place(world, "short") == "a"
    world.finish("long0")
    assert place(world, "stuck") is not None


def test_one_stage_spreads_by_price_and_never_migrates_when_balanced() -> None:
    """Without a plan there is one stage; equal requests are spread evenly, and none moves."""
    world = World(Cascade(), LARGE)
    world.join("a", "b", "c")
    for number in range(9):
        world.arrive(f"r{number}", 300)
    for _ in range(30):
        for instance_id in ("a", "b", "c"):
            world.grow(instance_id, 3)
            world.report(instance_id)
        world.deliver_all()
        world.advance(0.1)
    assert [len(world.on(i)) for i in ("a", "b", "c")] == [3, 3, 3]
    assert not [effect for effect in world.log if isinstance(effect, StartMigration)]


@pytest.mark.parametrize(("options", "kinds"), [({"migrate": False}, set()), ({"rebalance": False}, {"outgrew_stage"})])
def test_ablations(options: dict[str, bool], kinds: set[str]) -> None:
    """Without migration, nothing asks or moves; without rebalancing, only requests that outgrew their stage do."""
    world = staged(refine=False, **options)
    for number in range(6):
        world.arrive(f"r{number}", 60)
    for _ in range(20):
        world.grow("a", 5)
        world.report("a")
        world.deliver_all()
        for migration_id in list(world.moves):
            world.end(migration_id, MigrationOutcome.MOVED)
        world.advance(0.1)
    assert {e.reason.value for e in world.log if isinstance(e, StartMigration)} == kinds
    if not kinds:
        assert not [effect for effect in world.log if isinstance(effect, SendMessage)]


def test_a_new_layout_moves_nothing_at_once() -> None:
    """When the plan changes, requests that are now too long leave three at a time; those too short stay."""
    calls: list[StageLayout] = []

    def planner(_: object, __: object, ___: object, n: int, current: StageLayout) -> Proposal | None:
        calls.append(current)
        return Proposal((50,), (1, n - 1)) if len(calls) == 1 else None

    settings = PlanSettings(interval_s=1.0, min_requests=1, most_unknown=1.0)
    world = World(Cascade(planner=planner, planning=settings, rebalance=False, refine=False), LARGE)
    world.join("a", "b", "c")
    for number in range(18):
        world.arrive(f"r{number}", 60)
    for instance_id in ("a", "b", "c"):
        world.report(instance_id)
        world.grow(instance_id, 1)
    world.finish("r17")
    for _ in range(3):
        world.advance(0.6)
        for instance_id in ("a", "b", "c"):
            world.grow(instance_id, 10)
            world.report(instance_id)
        world.deliver_all()
    layouts = [effect.layout for effect in world.log if isinstance(effect, PublishLayout)]
    assert layouts[-1].boundaries_tokens == (50,)
    assert len(calls) >= 1
    moves = [effect for effect in world.log if isinstance(effect, StartMigration)]
    assert len(moves) == 3
    assert {move.source_id for move in moves} == set(layouts[-1].stages[0].instance_ids)


def test_a_follower_takes_over_the_stages_of_another_process() -> None:
    """Without its own planning and refinement, the layout in force is the announced one, and requests follow it."""
    world = staged(refine=False, replan=False)
    world.emit(LayoutAnnounced("layout", StageLayout.from_boundaries((600,), (("a", "c"), ("b",)))))
    layouts = [effect.layout for effect in world.log if isinstance(effect, PublishLayout)]
    assert layouts[-1].boundaries_tokens == (600,)
    world.arrive("short", 599)
    world.arrive("long", 600)
    assert place(world, "short") in {"a", "c"}
    assert place(world, "long") == "b"


def test_planning_sees_the_arrivals_of_other_processes() -> None:
    """The planner's workload includes what other processes have seen: rate, lengths, unfinished requests."""
    asked: list[tuple[LengthHistogram, float]] = []

    def planner(workload: LengthHistogram, rate_per_s: float, *_: object) -> Proposal | None:
        asked.append((workload, rate_per_s))
        return None

    world = World(Cascade(planner=planner, planning=PlanSettings(interval_s=1.0, min_requests=10)), LARGE)
    world.join("a", "b")
    world.advance(0.5)
    world.emit(WorkloadSeen("process:1", "1", 40, (SeenEnd(300, 50, 0.5),) * 20, (SeenLive(0.5, 3000, 40, 500),) * 20))
    world.report("a")
    world.advance(2.0)
    world.report("a")
    (workload, rate_per_s) = asked[-1]
    assert rate_per_s == pytest.approx(40 / 2.0, rel=0.05)
    assert workload.mean_prompt_tokens == pytest.approx(1650, rel=0.05)


def test_planner_takes_what_gains_and_keeps_what_is_as_good() -> None:
    """Stages for mixed lengths, none for equal ones, and no change if the layout in force is already the plan."""
    planner = ModelPlanner(MODEL, PlanSettings())
    ids = tuple(f"i{number}" for number in range(8))
    single = StageLayout.single(ids)
    better = planner(MIXED, 100.0, LARGE, 8, single)
    assert better is not None
    assert len(better.sizes) > 1
    assert planner(MIXED, 100.0, LARGE, 8, better.on(ids)) is None
    assert planner(ALIKE, 100.0, LARGE, 8, single) is None
    back = planner(ALIKE, 100.0, LARGE, 8, better.on(ids))
    assert back is not None
    assert back.sizes == (8,)


def test_a_small_sample_has_to_promise_more() -> None:
    """The gain required of a new plan falls with the root of the requests seen, towards the hysteresis, and decides."""
    settings = PlanSettings(hysteresis=0.06)
    assert settings.needed_gain(1000.0) == pytest.approx(0.12)
    assert settings.needed_gain(4000.0) == pytest.approx(0.09)
    assert settings.needed_gain(1e9) == pytest.approx(0.06, rel=1e-2)
    single = StageLayout.single(tuple(f"i{number}" for number in range(8)))
    assert ModelPlanner(MODEL, settings)(MIXED, 100.0, LARGE, 8, single) is not None
    assert ModelPlanner(MODEL, PlanSettings(hysteresis=0.9))(MIXED, 100.0, LARGE, 8, single) is None


def test_planner_above_capacity_plans_for_what_can_be_served() -> None:
    """A demand that no layout can carry is planned as a share of what a layout can carry."""
    ids = tuple(f"i{number}" for number in range(8))
    planned = ModelPlanner(MODEL, PlanSettings(overload_share=0.8))(MIXED, 1e6, LARGE, 8, StageLayout.single(ids))
    assert planned is not None
    assert len(planned.sizes) > 1
    assert ModelPlanner(MODEL, PlanSettings(overload_share=0.95))(MIXED, 1e6, LARGE, 8, planned.on(ids)) is not None


def test_planner_gives_up_when_no_layout_keeps_the_floor() -> None:
    """If not even the least demand can be served within the floor, the layout stays as it is."""
    planner = ModelPlanner(MODEL, PlanSettings(floor=ServiceFloor(tpot_s=0.001)))
    single = StageLayout.single(tuple(f"i{number}" for number in range(8)))
    assert planner(MIXED, 10.0, LARGE, 8, single) is None


def test_replanner_waits_for_enough() -> None:
    """It plans once per interval, and only if enough requests have finished."""
    asked: list[float] = []

    def planner(*arguments: object) -> Proposal | None:
        asked.append(float(str(arguments[1])))
        return None

    replanner = Replanner(planner, PlanSettings(interval_s=10.0, min_requests=3))
    current = StageLayout.single(("a", "b"))
    assert not replanner.is_due(0.0)
    assert not replanner.is_due(9.9)
    for number in range(4):
        replanner.workload.note_arrival(float(number))
    replanner.workload.note_finished(10, 10, 0.0)
    assert replanner.is_due(10.0)
    assert replanner.propose(current, LARGE, ("a", "b"), 10.0) is None
    assert asked == []
    assert not replanner.is_due(10.0)
    for _ in range(3):
        replanner.workload.note_finished(10, 10, 0.0)
    assert replanner.propose(current, LARGE, ("a", "b"), 20.0) is None
    assert len(asked) == 1
    assert asked[0] > 0.0


def test_instances_keep_their_order_when_stages_are_dealt_out() -> None:
    """The instance with the shortest requests becomes the short stage, so that few requests are out of place."""

    def planner(_: object, __: object, ___: object, n: int, ____: StageLayout) -> Proposal | None:
        return Proposal((500,), (1, n - 1))

    world = World(
        Cascade(planner=planner, planning=PlanSettings(interval_s=1.0, min_requests=1, most_unknown=1.0)), LARGE
    )
    world.join("a")
    world.arrive("long", 4000)
    world.join("b", "c")
    for number in range(4):
        world.arrive(f"short{number}", 100 + number)
    world.arrive("mid", 3000)
    for instance_id in ("a", "b", "c"):
        world.report(instance_id)
        world.grow(instance_id, 1)
    world.finish("short3")
    world.advance(1.1)
    world.report("a")
    layout = next(effect.layout for effect in reversed(world.log) if isinstance(effect, PublishLayout))
    shortest = min(("a", "b", "c"), key=lambda i: sum(r.tokens for r in world.on(i)) / max(1, len(world.on(i))))
    assert layout.stages[0].instance_ids == (shortest,)


def test_dispatch_effects_name_their_event() -> None:
    """A dispatch names the event that led to it."""
    world = staged()
    world.arrive("r", 50)
    assert [effect.cause for effect in world.log if isinstance(effect, Dispatch)] == ["r"]


def timed_steps(model: StepModel, n: int) -> tuple[StepSample, ...]:
    """Steps that take as long as a model says, with and without prompts."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(n):
        lengths = rng.integers(50, 3000, int(rng.integers(1, 30)))
        prefill = int(rng.integers(20, 500)) if number % 4 == 0 else 0
        batch = BatchFeatures(
            len(lengths), int(lengths.sum()), int(lengths.max()), prefill, prefill * (prefill + 1) / 2
        )
        found.append(StepSample(batch, model.step_s(batch)))
    return tuple(found)


def learnt(world: World) -> StepModel | None:
    """The cost model that the policy uses at present."""
    policy = world.policy
    assert isinstance(policy, Cascade)
    return policy._models.of("")


def report_steps(world: World, steps: tuple[StepSample, ...]) -> None:
    """A report of an idle instance that has timed these steps."""
    world.emit(InstanceReported("steps", "a", InstanceReport((), (), (), (), 0, 0.01, steps)))


def test_costs_are_learnt_from_nothing_and_stages_follow() -> None:
    """From one stage and no cost model, reported steps yield a model; then the workload yields stages and a reason."""
    planning = PlanSettings(interval_s=15.0, min_requests=100)
    world = World(Cascade(learning=LearningSettings(interval_s=5.0), planning=planning), LARGE)
    world.join(*(f"i{number}" for number in range(6)), "a", "b")
    assert learnt(world) is None
    for number in range(4000):
        world.arrive(f"r{number}", 8000 if number % 10 == 0 else 100)
        world.advance(0.01)
        if number % 20 == 0:
            report_steps(world, timed_steps(MODEL, 5))
        del world.requests[f"r{number}"]
        world.emit(RequestFinished("end", f"r{number}", 400 if number % 10 == 0 else 200))
    while world.now_s < 46.0:
        world.advance(0.5)
        report_steps(world, timed_steps(MODEL, 5))
    model = learnt(world)
    assert model is not None
    assert model.per_kv_token_s == pytest.approx(MODEL.per_kv_token_s, rel=0.05)
    published = [effect for effect in world.log if isinstance(effect, PublishLayout) and effect.why]
    assert len(published[0].layout.stages) > 1
    assert "predicted gain" in published[0].why


def test_prices_follow_what_is_learnt() -> None:
    """A queue of prompts is weighed by the learnt model, not by the initial assumption; urgency stays."""
    world = World(Cascade(step_model=MODEL, learning=LearningSettings(interval_s=1.0)), LARGE)
    world.join("a", "b")
    world.arrive("r", 2000)
    policy = world.policy
    assert isinstance(policy, Cascade)
    home = policy.view.requests["r"].place
    assert home is not None
    before, urgency = home.queue, home.pricing.urgency
    slow = replace(MODEL, per_prefill_token_s=3 * MODEL.per_prefill_token_s)
    for _ in range(20):
        world.advance(0.3)
        report_steps(world, timed_steps(slow, 100))
    assert home.pricing.per_queued_token == pytest.approx(3 * MODEL.per_prefill_token_s, rel=0.1)
    assert home.queue > 2 * before
    assert home.pricing.urgency == urgency


def test_a_fault_in_planning_leaves_the_layout_and_is_told() -> None:
    """A planner that raises loses only the plan: the layout stays, published with the failure; planning goes on."""
    asked = []

    def planner(*arguments: object) -> Proposal | None:
        asked.append(arguments)
        raise RuntimeError("no such thing")

    world = World(
        Cascade(
            layout=LAYOUT, planner=planner, planning=PlanSettings(interval_s=1.0, min_requests=1, most_unknown=1.0)
        ),
        LARGE,
    )
    world.join("a", "b", "c")
    for number in range(8):
        world.arrive(f"r{number}", 50)
        del world.requests[f"r{number}"]
        world.emit(RequestFinished("end", f"r{number}", 5))
        world.advance(0.6)
        world.report("a")
    failures = [effect for effect in world.log if isinstance(effect, PublishLayout) and effect.failure]
    assert len(asked) >= 2
    assert len(failures) == len(asked)
    assert "no such thing" in failures[0].failure
    assert failures[0].layout == LAYOUT
