"""
What a policy says of itself, so that nobody else has to know which one runs.

A policy's file has the class and, beside it, `INFO`: what it takes from its surroundings, what it is in one line, which parts of it can be switched
off. Who runs policies describes the surroundings (`Circumstances`), the same for all; the policy picks its options from them. What an
option is called, and its default, is said by the constructor alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """
    What whoever runs a policy can tell it.

    Attributes:
        layout: Stages to start with; None: the policy's own.
        step_model: Cost of a step, as far as it is known.
        planning: How to plan at run time.
        learns: Whether the steps that instances report say more of their cost than `step_model`.
        follows: Whether another process plans for all, and tells.
        front_ends: Processes that share out the requests, this one included.
        max_queued: Most requests that may wait for room in this process; None: no bound is wanted.
    """

    layout: StageLayout | None = None
    step_model: StepModel | None = None
    planning: PlanSettings = field(default_factory=PlanSettings)
    learns: bool = False
    follows: bool = False
    front_ends: int = 1
    max_queued: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """
    A policy with a part switched off, for ablations.

    Attributes:
        options: Of the constructor, over those that the policy picks.
        starts_with_plan: As in `PolicyInfo`.
    """

    options: Mapping[str, bool] = field(default_factory=dict)
    starts_with_plan: bool = True


def _nothing(_: Circumstances) -> dict[str, Any]:
    return {}


def _nothing_to_compile() -> None:
    """Most policies run no compiled code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInfo:
    """
    Attributes:
        make: The class; its keywords are the options.
        help: What it does, in half a line.
        takes_layout: Whether it works by stages that an operator can give.
        starts_with_plan: Whether an experiment gives it the planner's stages for the workload it will see.
        has_queue: Whether requests without room wait in it, at most `Circumstances.max_queued`, and more are refused.
        uses_profile: Whether a cost profile changes what it does; without one it learns costs as it serves.
        options_for: Options of the constructor in these circumstances.
        warm_up: Loads or compiles what it would otherwise compile under load: seconds, once.
        variants: Ablations by the word that follows the policy's name, as in `NAME-no-refine`.
    """

    make: Callable[..., Policy]
    help: str
    takes_layout: bool = False
    starts_with_plan: bool = False
    has_queue: bool = False
    uses_profile: bool = False
    options_for: Callable[[Circumstances], dict[str, Any]] = _nothing
    warm_up: Callable[[], None] = _nothing_to_compile
    variants: Mapping[str, Variant] = field(default_factory=dict)


def layout_option(around: Circumstances) -> dict[str, Any]:
    """For policies whose only concern is their stages."""
    return {} if around.layout is None else {"layout": around.layout}
