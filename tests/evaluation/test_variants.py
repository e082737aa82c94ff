"""Policies as experiments name them: names, initial plans, switches."""

from pathlib import Path

import pytest

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.evaluation.variants import check_policies, policy_names, policy_spec, starts_with_plan
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
