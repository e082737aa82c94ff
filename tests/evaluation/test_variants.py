"""Policies as experiments name them: names, initial plans, switches."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from cascadeinfer.core.errors import ConfigError, PlanError
from cascadeinfer.core.plan.objective import BalancedLatency, MeanNormalizedLatency, WeightedLatency
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.evaluation.runs import RunSpec, roles_for, run_once
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.evaluation.variants import check_policies, policy_names, policy_spec, role_search, starts_with_plan
from cascadeinfer.results.summary import Slo
from cascadeinfer.sim.settings import instance_ids

RATE_RPS = 12.0


@pytest.fixture(scope="module")
def setting() -> Setting:
    """Six instances and the sample trace."""
    return load_setting("h200-llama-3.1-8b", Path("sample"), 6)


def test_names_are_policies_and_their_variants() -> None:
    """A name is a policy, or a policy with a switch; anything else, and a duplicate, is refused."""
    names = policy_names()
    assert set(POLICIES) < set(names)
    assert {"cascade-cold", "cascade-no-refine", "cascade-static"} < set(names)
    assert len(names) == len(POLICIES) + sum(len(info.variants) for info in POLICIES.values())
    check_policies(names)
    for wrong, said in (([], "no policy"), (["cascade-hot"], "no policy 'cascade-hot'"), (names[:1] * 2, "twice")):
        with pytest.raises(ConfigError, match=said):
            check_policies(wrong)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_made(setting: Setting, name: str) -> None:
    """It is made with the workload's plan where it starts with one, and with its switches."""
    plan = setting.plan(RATE_RPS) if starts_with_plan(name) else None
    spec = policy_spec(name, setting, plan)
    spec.make()
    assert spec.name == name.partition("-")[0]
    has_plan = plan is not None and spec.options.get("layout") == plan.layout(instance_ids(6))
    assert has_plan == starts_with_plan(name)


def test_policies_with_roles_get_their_plan(setting: Setting) -> None:
    """`roles` gets stages of every kind and a budget for each, `pd_fixed` one ratio; nobody else gets any."""
    found = {name: role_search(name) for name in policy_names()}
    assert {name for name, search in found.items() if search is not None} == {
        "pd_fixed", "roles", "roles-no-overflow", "roles-no-share", "roles-static"
    }  # fmt: skip
    plan = setting.plan_roles(RATE_RPS, (2048,), split=True)
    options = policy_spec("pd_fixed", setting, None, plan).options
    assert options["roles"] == plan.layout(instance_ids(6))
    assert len(options["roles"].prefill) == len(options["roles"].stages.stages) == 1


def test_each_kind_of_plan_has_its_default_objective(setting: Setting) -> None:
    """Without one named, only plans with roles of any kind are balanced; a named one is for all."""
    whole = setting.plan_roles(RATE_RPS, (2048,))
    assert whole.problem.objective == BalancedLatency()
    assert setting.plan_roles(RATE_RPS, (2048,), split=True).problem.objective == MeanNormalizedLatency()
    assert setting.plan(RATE_RPS).problem.objective == MeanNormalizedLatency()
    named = replace(setting, objective=WeightedLatency())
    for name, here in product(("cascade", "roles"), (setting, named)):
        options = policy_spec(name, here, None, whole).options
        assert options["planning"].objective == here.objective, "plans made while serving have the same default"
    assert named.plan_roles(RATE_RPS, (2048,)).problem.objective == WeightedLatency()
    assert named.plan(RATE_RPS).problem.objective == WeightedLatency()


def test_roles_are_simulated_with_their_budgets(setting: Setting) -> None:
    """A run deals the planned budgets out to the instances, parks prompts, and counts every push as a migration."""
    spec = RunSpec("pd_fixed", RATE_RPS, 0, 300, Slo(2.0, 0.1), max_batched_tokens=1024)
    outcome = run_once(setting, spec)
    assert outcome.requests.finished.all()
    pushed = [reason == "prefilled" for reason in outcome.migrations.reason]
    assert sum(pushed) > 250
    fixed = run_once(setting, replace(spec, n_prefill=2))
    sources = {source for source, push in zip(fixed.migrations.source.tolist(), fixed.migrations.reason, strict=True)}
    assert sources == {0, 1}
    with pytest.raises(PlanError, match="leave none to decode"):
        run_once(setting, replace(spec, n_prefill=6))
    roles = roles_for(setting, replace(spec, policy="roles", max_batched_tokens=None))
    assert roles is not None
    assert {stage.budget_tokens for stage in (*roles.prefill, *roles.stages)} <= set(setting.role_budgets())


def test_who_starts_with_a_plan() -> None:
    """Policies whose stages are the planner's start with a plan, except the one that has to find it itself."""
    planned = {name for name in policy_names() if starts_with_plan(name)}
    assert planned == {"static_stages", *(name for name in policy_names() if name.startswith("cascade"))} - {
        "cascade-cold"
    }


def test_switches_reach_the_policy(setting: Setting) -> None:
    """A variant's options are its policy's, overridden by its own."""
    plan = setting.plan(RATE_RPS)
    whole = policy_spec("cascade", setting, plan).options
    assert policy_spec("cascade-static", setting, plan).options == {**whole, "refine": False, "replan": False}
    assert whole["step_model"] == setting.profile.step_model
    assert "learning" not in whole
