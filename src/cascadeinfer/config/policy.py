"""Builds the policy from the options of `serve`."""

from collections.abc import Callable

from cascadeinfer.config.profiles import load_fit_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.histogram import DEFAULT_MAX_TOKENS
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.layout import RoleLayout, StageLayout
from cascadeinfer.core.plan.problem import HandOverCost
from cascadeinfer.core.plan.scale import ServiceLevel
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.info import Circumstances, PolicyInfo, RoleSearch
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.policy import Policy


def policy_spec(options: ServeOptions, *, follows: bool = False) -> PolicySpec:
    """
    The specification of the policy that the options name.

    Args:
        options: The options of `serve`.
        follows: Whether another process plans for all, so that this one adopts its stages.

    Raises:
        ConfigError: Stages, a profile, a queue bound or an SLO are given to a policy that has none, or half an SLO.
        ProfileError: The profile does not exist or cannot be read.
    """
    name = options.policy_name()
    info = POLICIES[name]
    if info.roles is None:
        roles, layout = None, options.layout()
    else:
        roles, layout = _checked_roles(name, info.roles, options), None
    _check_takes(name, info, options)
    return PolicySpec(name, info.options_for(_circumstances(options, layout, roles, follows=follows)))


def _checked_roles(name: str, search: RoleSearch, options: ServeOptions) -> RoleLayout | None:
    roles = options.roles()
    if roles is None and search is RoleSearch.FULL:
        return None  # it plans while it serves
    if roles is None:
        raise ConfigError(
            f"policy {name} does not plan while it serves, and needs its stages",
            option="--policy",
            fix="give --stages, as `cascadeinfer plan --roles --json FILE` writes them",
        )
    if search is RoleSearch.SPLIT and (len(roles.prefill), len(roles.stages.stages)) != (1, 1):
        raise ConfigError(
            f"policy {name} has one stage for prompts and one that decodes",
            option="--stages",
            fix="write e.g. prefill@0-:1,0-:3, or use --policy roles",
        )
    if search is RoleSearch.SPLIT and roles.threshold_tokens > 0:
        raise ConfigError(
            f"policy {name} computes all prompts apart",
            option="--stages",
            fix="write prefill@0-, or use --policy roles",
        )
    return roles


def _check_takes(name: str, info: PolicyInfo, options: ServeOptions) -> None:
    if options.profile is not None and not info.uses_profile:
        raise ConfigError(
            f"policy {name} needs no profile", option="--profile", fix=_or_use(lambda other: other.uses_profile)
        )
    if options.max_queued_requests != ServeOptions().max_queued_requests and not info.has_queue:
        raise ConfigError(
            f"policy {name} has no queue: its instances queue without a bound",
            option="--max-queued-requests",
            fix=_or_use(lambda other: other.has_queue),
        )
    given = {"--ttft-slo-s": options.ttft_slo_s, "--tpot-slo-s": options.tpot_slo_s}
    limits = [flag for flag, limit_s in given.items() if limit_s]
    if len(limits) == 1:
        missing = next(flag for flag in given if flag not in limits)
        raise ConfigError("an SLO has two limits", option=limits[0], fix=f"give {missing}, too")
    if limits and not info.uses_profile:
        raise ConfigError(
            f"policy {name} does not plan, and so cannot say how many instances an SLO needs",
            option=limits[0],
            fix=_or_use(lambda other: other.uses_profile),
        )
    if options.stages is not None and not info.takes_layout and info.roles is None:
        raise ConfigError(
            f"policy {name} has no stages", option="--stages", fix=_or_use(lambda other: other.takes_layout)
        )


def _service_level(options: ServeOptions) -> ServiceLevel | None:
    if not options.ttft_slo_s:
        return None
    return ServiceLevel(options.ttft_slo_s, options.tpot_slo_s, options.slo_attainment)


def _or_use(fits: Callable[[PolicyInfo], bool]) -> str:
    served = [name for name, info in POLICIES.items() if fits(info)]
    return f"leave it out, or use --policy {' or '.join(served)}"


def _circumstances(
    options: ServeOptions, layout: StageLayout | None, roles: RoleLayout | None, *, follows: bool
) -> Circumstances:
    """The circumstances of serving; the queue in front of the instances is divided among the processes."""
    profile = (
        None if options.profile is None else load_fit_profile(options.profile, accept_poor=options.accept_poor_profile)
    )
    pause_per_token_s = 0.0 if profile is None else profile.transfer_s(1)
    hand_over = HandOverCost(pause_per_token_s=pause_per_token_s, copied_ahead=True)
    return Circumstances(
        layout=layout,
        roles=roles,
        step_model=None if profile is None else profile.step_model,
        planning=PlanSettings(
            max_tokens=DEFAULT_MAX_TOKENS, hand_over=hand_over, service_level=_service_level(options)
        ),
        learns=True,
        follows=follows,
        front_ends=options.api_servers,
        max_queued=-(-options.max_queued_requests // options.api_servers),
    )


def make_policy(options: ServeOptions, *, follows: bool = False) -> Policy:
    """
    The policy that the options name.

    Args:
        options: The options of `serve`.
        follows: See `policy_spec`.

    Raises:
        ConfigError: Stages, a profile or a queue bound are given to a policy that has none.
        ProfileError: The profile does not exist or cannot be read.
    """
    return policy_spec(options, follows=follows).make()
