"""
Policies as experiments know them: every policy of `core/policies` under its own name, and its variants with a part switched off.

All start fresh. Policies with stages start with the layout that the planner gives for the trace's lengths and the run's rate, as an
operator who knows yesterday's lengths would, but for variants that are to find it themselves.
"""

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.plan.planner import Plan
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.info import Circumstances, Variant
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.evaluation.setting import Setting
from cascadeinfer.sim.settings import instance_ids


def policy_names() -> list[str]:
    """Every name that `policy_spec` takes, sorted."""
    return sorted(_known())


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
    policy, variant = _known()[name]
    return POLICIES[policy].starts_with_plan and variant.starts_with_plan


def policy_spec(name: str, setting: Setting, plan: Plan | None) -> PolicySpec:
    """
    What makes the policy.

    Args:
        name: One of `policy_names()`.
        setting: What it runs in.
        plan: For the policies of `starts_with_plan`.
    """
    policy, variant = _known()[name]
    around = Circumstances(
        layout=plan.layout(instance_ids(setting.n_instances)) if plan is not None and starts_with_plan(name) else None,
        step_model=setting.profile.step_model,
        planning=PlanSettings(
            objective=setting.objective,
            margin=setting.margin,
            hand_over=setting.hand_over,
            max_tokens=setting.context_tokens + 1,
        ),
    )
    return PolicySpec(policy, {**POLICIES[policy].options_for(around), **variant.options})


def _known() -> dict[str, tuple[str, Variant]]:
    """Each name's policy, and what is switched off there."""
    known = {policy: (policy, Variant()) for policy in POLICIES}
    for policy, info in POLICIES.items():
        known |= {f"{policy}-{word}": (policy, variant) for word, variant in info.variants.items()}
    return known
