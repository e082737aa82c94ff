"""
Policies as experiments know them: every policy of `core/policies` under its own name, and variants of `cascade` with a part switched off.

All start fresh. Policies with stages start with the layout that the planner gives for the trace's lengths and the run's rate, as an
operator who knows yesterday's lengths would; `cascade-cold` starts with one stage and has to learn.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.plan.planner import Plan
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.evaluation.setting import Setting
from cascadeinfer.sim.settings import instance_ids

CASCADE: Final = "cascade"
COLD: Final = "cascade-cold"

CASCADE_VARIANTS: Final[Mapping[str, Mapping[str, bool]]] = MappingProxyType(
    {
        CASCADE: {},
        COLD: {},
        "cascade-no-refine": {"refine": False},
        "cascade-no-rebalance": {"rebalance": False},
        "cascade-no-affinity": {"affinity": False},
        "cascade-no-replan": {"replan": False},
        "cascade-static": {"refine": False, "replan": False},
        "cascade-no-migrate": {"migrate": False},
    }
)
"""Switches of `Cascade`; "static" is a plan that is never changed, neither by refinement nor by planning anew."""

WITH_LAYOUT: Final = frozenset({"static_stages"})
"""Other policies that need a layout."""


def policy_names() -> list[str]:
    """Every name that `policy_spec` takes, sorted."""
    return sorted({*POLICIES, *CASCADE_VARIANTS})


def check_policies(names: list[str], option: str = "--policy") -> None:
    """
    Refuse names that are no policy.

    Raises:
        ConfigError: One is unknown or named twice, or there is none.
    """
    if not names:
        raise ConfigError("no policy is named", option=option, fix=f"some of {', '.join(policy_names())}")
    for name in names:
        if name not in policy_names():
            raise ConfigError(f"no policy {name!r}", option=option, fix=f"one of {', '.join(policy_names())}")
        if names.count(name) > 1:
            raise ConfigError(f"{name!r} is named twice", option=option)


def starts_with_plan(name: str) -> bool:
    """Whether this policy is given the planner's layout to start with."""
    return name in WITH_LAYOUT or (name in CASCADE_VARIANTS and name != COLD)


def policy_spec(name: str, setting: Setting, plan: Plan | None) -> PolicySpec:
    """
    What makes the policy.

    Args:
        name: One of `policy_names()`.
        setting: What it runs in.
        plan: For the policies of `starts_with_plan`.
    """
    options: dict[str, Any] = {}
    if plan is not None and starts_with_plan(name):
        options["layout"] = plan.layout(instance_ids(setting.n_instances))
    if name not in CASCADE_VARIANTS:
        return PolicySpec(name, options)
    planning = PlanSettings(
        objective=setting.objective,
        margin=setting.margin,
        hand_over=setting.hand_over,
        max_tokens=setting.context_tokens + 1,
    )
    options |= {**CASCADE_VARIANTS[name], "step_model": setting.profile.step_model, "planning": planning}
    return PolicySpec(CASCADE, options)
