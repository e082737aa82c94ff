"""From the options of `serve` to the policy that they name."""

from dataclasses import replace
from typing import Any

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.adapt.replanning import ModelPlanner, PlanSettings
from cascadeinfer.core.cost.histogram import DEFAULT_MAX_TOKENS, LengthHistogram
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import LearningSettings, StepLearner
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.plan.problem import HandOverCost
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity

CASCADE = "cascade"
POLICIES_WITH_STAGES = ("cascade", "static_length", "static_stages")
"""Policies that take a layout; without `--stages` it is one stage."""


def policy_spec(options: ServeOptions, *, follows: bool = False) -> PolicySpec:
    """
    What makes the policy that the options name.

    Args:
        follows: Whether another process plans for all: this one's stages are what that one says.

    Raises:
        ConfigError: Stages, a profile or a bound of the queue are given to a policy that has none.
        ProfileError: The profile does not exist or cannot be read.
    """
    name = options.policy_name()
    layout = options.layout()
    if name == CASCADE:
        return _cascade_spec(options, layout, follows=follows)
    if options.profile is not None:
        raise ConfigError(
            f"policy {name} needs no profile", option="--profile", fix=f"leave it out, or use --policy {CASCADE}"
        )
    if options.max_queued_requests != ServeOptions().max_queued_requests:
        raise ConfigError(
            f"policy {name} has no queue: its instances queue without a bound",
            option="--max-queued-requests",
            fix=f"leave it out, or use --policy {CASCADE}",
        )
    if name in POLICIES_WITH_STAGES:
        return PolicySpec(name, {"layout": layout})
    if options.stages is not None:
        raise ConfigError(
            f"policy {name} has no stages",
            option="--stages",
            fix=f"leave it out, or use --policy {' or '.join(POLICIES_WITH_STAGES)}",
        )
    return PolicySpec(name, {"clients": options.api_servers} if name == "vllm_dp" else {})


def _cascade_spec(options: ServeOptions, layout: StageLayout, *, follows: bool) -> PolicySpec:
    """
    The cascade as it serves: it learns what steps cost, from the profile if there is one, and plans from what it sees.

    One that follows does neither. The queue in front of the instances is shared out among the processes.
    """
    planning = PlanSettings(max_tokens=DEFAULT_MAX_TOKENS)
    found: dict[str, Any] = {
        "layout": layout,
        "planning": planning,
        "max_queued": -(-options.max_queued_requests // options.api_servers),
    }
    found |= {"refine": False, "replan": False} if follows else {"learning": LearningSettings()}
    if options.profile is not None:
        profile = load_profile(options.profile)
        pause = HandOverCost(pause_per_token_s=profile.transfer_s(1))
        found |= {"step_model": profile.step_model, "planning": replace(planning, hand_over=pause)}
    return PolicySpec(CASCADE, found)


def warm_up_planner() -> None:
    """Load, or compile, what planning needs: seconds that must not come upon a server that serves."""
    capacity = InstanceCapacity(kv_blocks=10_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=2048)
    model = StepModel(base_s=0.01, per_decode_s=1e-5, per_kv_token_s=1e-7, per_prefill_token_s=1e-5, per_prefill_attention_s=1e-10)  # fmt: skip
    planner = ModelPlanner(model, PlanSettings(max_tokens=DEFAULT_MAX_TOKENS))
    workload = LengthHistogram.from_requests([100, 100, 4000], [50, 500, 300], max_tokens=DEFAULT_MAX_TOKENS)
    planner(workload, 10.0, capacity, 4, StageLayout.single(("0", "1", "2", "3")))
    learner = StepLearner(model)
    learner.observe([StepSample(BatchFeatures(1, 10, 10), 0.01)])
    learner.update(1.0)


def make_policy(options: ServeOptions, *, follows: bool = False) -> Policy:
    """
    The policy that the options name.

    Args:
        follows: See policy_spec.

    Raises:
        ConfigError: Stages or a profile are given to a policy that has none.
        ProfileError: The profile does not exist or cannot be read.
    """
    return policy_spec(options, follows=follows).make()
