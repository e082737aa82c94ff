"""
A policy's description of itself, so that no other code needs to know which policy runs.

Each policy's file defines the class and, beside it, `INFO`: which inputs it uses, a one-line summary, and which of its
parts can be switched off. The code that runs a policy describes its environment with `Circumstances`, the same for all
policies, and the policy derives its options from them. Names and defaults of options are defined by the constructor
alone.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.layout import RoleLayout, StageLayout
from cascadeinfer.core.policy import Policy


class RoleSearch(enum.Enum):
    """Which plans with roles a policy can carry out."""

    FULL = "full"
    """All: prefill stages or none, any stages, a chunk budget for each."""
    SPLIT = "split"
    """One prefill stage for all prompts, one stage that decodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """
    What the code that runs a policy can tell it.

    Attributes:
        layout: Stages to start with; None leaves them to the policy.
        roles: Stages with roles, for policies that need them.
        step_model: Cost of a step, as far as it is known.
        planning: How to plan at run time.
        learns: Whether the steps that instances report are a better source for their cost than `step_model`.
        follows: Whether another process plans for all and announces its layouts.
        front_ends: Number of processes that share the requests, including this one.
        max_queued: Maximum number of requests that wait for room in this process; None for no bound.
    """

    layout: StageLayout | None = None
    roles: RoleLayout | None = None
    step_model: StepModel | None = None
    planning: PlanSettings = field(default_factory=PlanSettings)
    learns: bool = False
    follows: bool = False
    front_ends: int = 1
    max_queued: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """
    A policy with a part switched off, for ablation studies.

    Attributes:
        options: Options of the constructor that override those the policy derives.
        starts_with_plan: As in `PolicyInfo`.
    """

    options: Mapping[str, bool] = field(default_factory=dict)
    starts_with_plan: bool = True


def _nothing(_: Circumstances) -> dict[str, Any]:
    return {}


def _nothing_to_compile() -> None:
    """For the many policies without compiled code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInfo:
    """
    The entry of one policy in `POLICIES`.

    Attributes:
        make: The class; its keywords are the options.
        help: What it does, in half a line.
        takes_layout: Whether it uses stages that an operator can set.
        starts_with_plan: Whether an experiment gives it the planner's stages for the workload it will see.
        roles: Which plans with roles it can carry out; None: it has no roles.
        has_queue: Whether requests without room wait in the policy, at most `Circumstances.max_queued`; further ones
            are refused.
        uses_profile: Whether a cost profile changes its behaviour; without one it learns costs while serving.
        options_for: The constructor's options in these circumstances.
        warm_up: Loads or compiles what would otherwise be compiled under load; takes seconds, once.
        variants: Ablations by the suffix of the policy's name, as in `NAME-no-refine`.
    """

    make: Callable[..., Policy]
    help: str
    takes_layout: bool = False
    starts_with_plan: bool = False
    roles: RoleSearch | None = None
    has_queue: bool = False
    uses_profile: bool = False
    options_for: Callable[[Circumstances], dict[str, Any]] = _nothing
    warm_up: Callable[[], None] = _nothing_to_compile
    variants: Mapping[str, Variant] = field(default_factory=dict)


def layout_option(around: Circumstances) -> dict[str, Any]:
    """For policies whose only option from the environment is their stages."""
    return {} if around.layout is None else {"layout": around.layout}
