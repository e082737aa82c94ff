"""
The policies of experiments: those of `core/policies`, and their variants with a part switched off.

All start fresh. Policies with stages start with the planner's layout for the trace's lengths and the run's rate, like
an operator who knows yesterday's lengths. Variants that are meant to find the layout themselves do not.
"""

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.plan.planner import Plan
from cascadeinfer.core.plan.role_plan import RolePlan
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.info import Circumstances, RoleSearch, Variant
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.evaluation.setting import Setting
from cascadeinfer.sim.settings import instance_ids


def policy_names() -> list[str]:
    """Every name that `policy_spec` takes, sorted."""
    return sorted(_known())


def check_policies(names: list[str], option: str = "--policy") -> None:
    """
    Check the names of policies.

    Raises:
        ConfigError: A name is unknown or given twice, or there is none.
    """
    if not names:
        raise ConfigError("no policy is named", option=option, fix=f"some of {', '.join(policy_names())}")
    for name in names:
        if name not in policy_names():
            raise ConfigError(f"no policy {name!r}", option=option, fix=f"one of {', '.join(policy_names())}")
        if names.count(name) > 1:
            raise ConfigError(f"{name!r} is named twice", option=option)


def starts_with_plan(name: str) -> bool:
    """Whether this policy starts with the planner's layout."""
    policy, variant = _known()[name]
    return POLICIES[policy].starts_with_plan and variant.starts_with_plan


def role_search(name: str) -> RoleSearch | None:
    """Which plans with roles this policy can carry out; None for a policy without roles."""
    return POLICIES[_known()[name][0]].roles


def policy_spec(
    name: str, setting: Setting, plan: Plan | None, roles: RolePlan | None = None, *, follows: bool = False
) -> PolicySpec:
    """
    The specification of a policy.

    Args:
        name: One of `policy_names()`.
        setting: The setting it runs in.
        plan: The initial plan, for the policies of `starts_with_plan`.
        roles: The plan with roles, for the policies of `role_search`.
        follows: Whether another front-end process plans for all.
    """
    policy, variant = _known()[name]
    around = Circumstances(
        layout=plan.layout(instance_ids(setting.n_instances)) if plan is not None and starts_with_plan(name) else None,
        roles=None if roles is None else roles.layout(instance_ids(setting.n_instances)),
        step_model=setting.profile.step_model,
        planning=PlanSettings(
            objective=setting.stage_objective,
            margin=setting.margin,
            hand_over=setting.hand_over,
            max_tokens=setting.context_tokens + 1,
        ),
        follows=follows,
    )
    return PolicySpec(policy, {**POLICIES[policy].options_for(around), **variant.options})


def _known() -> dict[str, tuple[str, Variant]]:
    """For each name, the policy and its variant."""
    known = {policy: (policy, Variant()) for policy in POLICIES}
    for policy, info in POLICIES.items():
        known |= {f"{policy}-{word}": (policy, variant) for word, variant in info.variants.items()}
    return known
