"""Plans with roles made while serving: who becomes what, when it is worth it, and that nothing is lost on the way."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.adapt.role_adaptation import deal
from cascadeinfer.core.effects import AssignTerms, Effect, PublishLayout, StartMigration
from cascadeinfer.core.events import Event, InstanceChanged, InstanceJoined, LayoutAnnounced, PinReason, RequestArrived
from cascadeinfer.core.kind import InstanceKind, InstanceTerms, Role
from cascadeinfer.core.layout import RoleLayout, Stage, StageLayout
from cascadeinfer.core.plan.role_plan import PushCost, RolePlan
from cascadeinfer.core.plan.role_prediction import StageInForce, predict_roles
from cascadeinfer.core.plan.roles import solve_roles
from cascadeinfer.core.policies.roles import Roles
from cascadeinfer.core.types import InstanceCapacity, InstanceId, LengthRange
from cascadeinfer.core.view import InstanceView
from cascadeinfer.sim.faults import Crash, FaultPlan
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import SimConfig, SimKind, instance_ids
from cascadeinfer.workload.trace import Trace
from support.plan_problems import MODEL, problem_at

CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=4096)
PUSH = PushCost(0.01, 1e-7)
QUICK = PlanSettings(interval_s=10.0, memory_s=40.0, min_requests=50, max_tokens=32_768)
N = 4


def in_force(plan: RolePlan, *, prefill: bool) -> list[StageInForce]:
    """The stages of a plan as those in force."""
    stages = plan.prefill if prefill else plan.stages
    return [StageInForce(stage.range, stage.n_instances, stage.budget_tokens) for stage in stages]


@pytest.mark.parametrize(("load", "n_instances", "may_push"), [(0.6, 4, True), (0.85, 8, True), (0.85, 8, False)])
def test_a_plan_in_force_costs_what_the_search_said(load: float, n_instances: int, may_push: bool) -> None:
    """Otherwise a plan would seem to gain over itself."""
    problem = problem_at(load, n_instances)
    plan = solve_roles(problem, (512, 4096), PUSH, may_push=may_push)
    assert may_push or not plan.prefill
    cost = predict_roles(problem, in_force(plan, prefill=True), in_force(plan, prefill=False), PUSH)
    assert cost == pytest.approx(plan.cost, rel=1e-9)


def test_stages_that_cannot_be_are_infinitely_bad() -> None:
    """One without instances, and two boundaries in one bucket."""
    problem = problem_at(0.5, 4)
    everything = StageInForce(LengthRange(0), 0, 4096)
    assert predict_roles(problem, [], [everything], PUSH) == np.inf
    close = [StageInForce(LengthRange(0, 5000), 2, 4096), StageInForce(LengthRange(5000, 5001), 1, 4096)]
    assert predict_roles(problem, [], [*close, StageInForce(LengthRange(5001), 1, 4096)], PUSH) == np.inf


def views(*kv_tokens: int, first: int = 0) -> list[InstanceView]:
    """Instances with this much KV cache in use, all of one request each."""
    found = []
    for number, tokens in enumerate(kv_tokens, first):
        view = InstanceView(str(number), InstanceKind(CAPACITY))
        if tokens:
            view.add(f"r{number}", tokens, waits=False)
        found.append(view)
    return found


def names(dealt: list[list[InstanceView]]) -> list[str]:
    """The ids of each stage."""
    return ["".join(view.instance_id for view in stage) for stage in dealt]


def plan_with(n_prefill: int, *decode: int) -> RolePlan:
    """A plan that has these sizes and says nothing else."""
    some = solve_roles(problem_at(0.85, 8), (512, 4096), PUSH)
    assert some.prefill, "the workload of these tests has prefill stages"
    prefill = (replace(some.prefill[0], n_instances=n_prefill),) if n_prefill else ()
    stages = tuple(replace(some.stages[0], n_instances=n) for n in decode)
    return replace(some, prefill=prefill, stages=stages)


def test_instances_keep_their_roles() -> None:
    """With as many prefill instances as before, none changes; the others are dealt out by the lengths they hold."""
    prefill, members = views(0, 0), [views(900, 100, first=2), views(4000, first=4)]
    assert names(deal(plan_with(2, 1, 2), prefill, members)) == ["01", "3", "24"]


def test_the_cheapest_to_empty_computes_prompts() -> None:
    """One more prefill instance: the one with the least KV cache."""
    prefill, members = views(0), [views(900, 100, first=1), views(4000, first=3)]
    assert names(deal(plan_with(2, 1, 1), prefill, members)) == ["02", "1", "3"]


def test_the_idlest_prefill_instance_decodes_again() -> None:
    """And first the shortest requests, for it holds none."""
    prefill, members = views(700, 0), [views(900, first=2), views(4000, first=3)]
    assert names(deal(plan_with(1, 2, 1), prefill, members)) == ["0", "12", "3"]
    assert names(deal(plan_with(0, 2, 2), prefill, members)) == ["01", "23"]


def turning(seed: int = 1) -> Trace:
    """Chat for 60 s, then 60 s of long prompts with short answers."""
    rng = np.random.default_rng(seed)
    chat, long = 600, 360
    prompts = np.concatenate((rng.integers(50, 400, chat), rng.integers(2000, 6000, long)))
    outputs = np.concatenate((rng.integers(100, 300, chat), rng.integers(40, 120, long)))
    arrivals = np.concatenate((np.sort(rng.uniform(0, 60, chat)), np.sort(rng.uniform(60, 120, long))))
    return Trace.from_columns(prompts, outputs, arrivals)


def run(
    policy: Roles, faults: FaultPlan | None = None, kinds: Mapping[InstanceId, SimKind] | None = None
) -> tuple[SimResult, list[tuple[Event, list[Effect]]]]:
    """Simulate `turning` on four instances; returns the result and every event with its effects."""
    config = SimConfig(
        instances=N,
        capacity=CAPACITY,
        step_model=MODEL,
        kv_bytes_per_token=131_072.0,
        context_tokens=16_384,
        faults=faults or FaultPlan(),
        kinds=kinds or {},
    )
    seen: list[tuple[Event, list[Effect]]] = []
    result = simulate(turning(), policy, config, observer=lambda _, event, effects: seen.append((event, effects)))
    return result, seen


def test_roles_follow_the_workload() -> None:
    """Chat needs no prefill stages, long prompts do: without a plan to start with, nothing is lost, and it pays."""
    result, seen = run(Roles(step_model=MODEL, planning=QUICK))
    assert result.requests.finished.all()
    assigned = [e for _, effects in seen for e in effects if isinstance(e, AssignTerms)]
    changed = [event for event, _ in seen if isinstance(event, InstanceChanged)]
    assert len(changed) == len(assigned) > 0
    published = [e for _, effects in seen for e in effects if isinstance(e, PublishLayout)]
    assert not published[0].prefill
    assert published[-1].prefill
    computing = {i for stage in published[-1].prefill for i in stage.instance_ids}
    roles = {event.instance_id: event.kind.role for event in changed}
    assert {i for i, role in roles.items() if role is Role.PREFILL} == computing
    kept, _ = run(Roles(step_model=MODEL, replan=False))
    counted = result.requests.arrival_s > 80.0
    both = [float(each.requests.normalised_latency_s[counted].mean()) for each in (result, kept)]
    assert both[0] < both[1]


def test_terms_outlive_an_instance() -> None:
    """One that dies and comes back has the role and the budget that it was last given."""
    _, before = run(Roles(step_model=MODEL, planning=QUICK))
    changed = [event for event, _ in before if isinstance(event, InstanceChanged)]
    name, kind = changed[0].instance_id, [e for e in changed if e.instance_id == changed[0].instance_id][-1].kind
    result, seen = run(Roles(step_model=MODEL, planning=QUICK), FaultPlan(crashes=(Crash(118.0, name, 1.0),)))
    assert result.requests.finished.all()
    back = [event for event, _ in seen if isinstance(event, InstanceJoined) and event.instance_id == name]
    assert [event.kind for event in back] == [InstanceKind(CAPACITY), kind]


def test_what_becomes_a_prefill_instance_is_emptied() -> None:
    """Requests that decode there are offered to the others, and those parked elsewhere are pushed."""
    _, seen = run(Roles(step_model=MODEL, planning=QUICK))
    at = next(n for n, (_, effects) in enumerate(seen) if any(_computes(e) for e in effects))
    becomes = {e.instance_id for e in seen[at][1] if _computes(e)}
    moves = [e for _, effects in seen[at:] for e in effects if isinstance(e, StartMigration)]
    assert any(move.source_id in becomes for move in moves)


def _computes(effect: Effect) -> bool:
    return isinstance(effect, AssignTerms) and effect.terms.role is Role.PREFILL


def test_pinned_requests_have_no_prefill_stages() -> None:
    """What may not move cannot be pushed: no instance is set aside for prompts then."""

    class Pinning(Roles):
        """Sees every request pinned, as with a model whose requests cannot move."""

        def handle(self, event: Event, now_s: float) -> list[Effect]:
            if isinstance(event, RequestArrived):
                event = replace(event, pin_reason=PinReason.ENGINE)
            return super().handle(event, now_s)

    result, seen = run(Pinning(step_model=MODEL, planning=QUICK))
    assert result.requests.finished.all()
    assert not any(e.prefill for _, effects in seen for e in effects if isinstance(e, PublishLayout))


def test_instances_that_were_started_for_a_role_keep_it() -> None:
    """One with other slots than the rest: no plan is made for instances that differ."""
    kinds = {"i0": SimKind(InstanceKind(replace(CAPACITY, max_num_seqs=16)), MODEL)}
    result, seen = run(policy := Roles(step_model=MODEL, planning=QUICK), kinds=kinds)
    assert result.requests.finished.all()
    assert not any(isinstance(e, AssignTerms) for _, effects in seen for e in effects)
    planned = policy.next_plan()
    assert planned is not None
    assert "several kinds" in str(planned)


def test_a_follower_has_the_prefill_stages_of_the_one_that_plans() -> None:
    """Announced with the layout; an empty list takes them back."""
    policy = Roles(replan=False)
    for name in "abc":
        policy.handle(InstanceJoined("up", name, InstanceKind(CAPACITY)), 0.0)
    decode, prefill = Stage(LengthRange(0), ("b", "c")), Stage(LengthRange(500), ("a",))
    policy.handle(LayoutAnnounced("layout", StageLayout((decode,)), (prefill,)), 1.0)
    assert [view.instance_id for view in policy.view.members()] == ["b", "c"]
    dispatched = policy.handle(RequestArrived("r", "r", 600, 100), 2.0)
    assert [(e.instance_id, e.park) for e in dispatched] == [("a", True)]  # type: ignore[union-attr]
    policy.handle(LayoutAnnounced("layout", StageLayout.single(("a", "b", "c"))), 3.0)
    assert len(policy.view.members()) == 3


def test_an_heir_of_a_prefill_instance_is_published() -> None:
    """In a rolling update, although the stages that decode are the same: other processes must hear of it."""
    roles = RoleLayout(StageLayout.single(("b",)), (Stage(LengthRange(500), ("a",)),))
    policy = Roles(roles=roles)
    published: list[Effect] = []
    for name, replaced in (("a", None), ("b", None), ("c", "a")):
        effects = policy.handle(InstanceJoined("up", name, InstanceKind(CAPACITY), replaces=replaced), 0.0)
        published += [effect for effect in effects if isinstance(effect, PublishLayout)]
    assert [[stage.instance_ids for stage in effect.prefill] for effect in published] == [[("a",)], [("a", "c")]]  # type: ignore[union-attr]


def test_one_that_is_back_after_a_plan_without_it_decodes() -> None:
    """It had the role of a prefill instance when it died, and no stage names it any more."""
    policy = Roles()
    for name, role in (("a", Role.MIXED), ("b", Role.PREFILL)):
        kind = InstanceKind(CAPACITY).with_terms(InstanceTerms(role, 512))
        assigned = [e for e in policy.handle(InstanceJoined("up", name, kind), 0.0) if isinstance(e, AssignTerms)]
        assert [(e.instance_id, e.terms) for e in assigned] == ([("b", InstanceTerms())] if name == "b" else [])
    assert len(policy.view.members()) == 2


def test_terms_change_what_can_be_changed() -> None:
    """Role and budget; the largest budget is remembered, and is back when none is given."""
    kind = InstanceKind(CAPACITY)
    small = kind.with_terms(InstanceTerms(Role.DECODE, 512))
    assert (small.role, small.capacity.max_batched_tokens, small.most_tokens) == (Role.DECODE, 512, 4096)
    assert small.capacity.kv_tokens == CAPACITY.kv_tokens
    again = small.with_terms(InstanceTerms())
    assert again.capacity == CAPACITY
    assert small.with_terms(InstanceTerms(Role.DECODE, 512)) == small


def test_the_layout_in_words() -> None:
    """As the log shows it."""
    roles = RoleLayout(StageLayout.single(instance_ids(2)[1:]), (Stage(LengthRange(512), ("0",)),))
    assert [str(stage) for stage in (*roles.prefill, *roles.stages.stages)] == ["512-: 1 instance", "0-: 1 instance"]
