"""
The cascade with prefill stages: one plan says which instances compute prompts, and which decode which lengths.

A prompt of at least the plan's threshold is computed in a prefill stage and pushed to the stage of its length with its
first token (`core/placing/pushing.py`). All other prompts, and everything after the first token, are the cascade's
(`core/policies/cascade.py`): the cheapest instance of the stage with room, sharing of backlogs, hand-over by bid-ask.

*Overflow.* When prompts queue in the prefill stage for longer than one full step takes (`Pricing.full_step`, but at
least `SHORT` empty steps), one is computed where it decodes, in its own stage or a longer one, if that takes less of
everybody's time together. On an instance with n requests it takes the queue there, which the prompt waits for, and
n + 1 times its own computation, for which all of them wait. Decode instances have many requests, so this happens when
prompts queue for seconds, because more come than were planned for, or on an instance that hardly decodes.

*Replanning.* Stages, threshold and chunk budgets are planned anew from what has been seen, and are put in force when
that gains enough (`core/adapt/role_adaptation.py`). Without stages to start with, one stage computes and decodes
everything until the first plan. Ranges are not refined between plans.

Edge cases: those of `core/placing/pushing.py`. Inputs read: those of the cascade. Source: arXiv 2512.19179 for the
stages, DistServe (arXiv 2401.09670) for the prefill instances.
"""

from dataclasses import replace
from typing import Any, Final

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.adapt.role_adaptation import RoleAdaptation
from cascadeinfer.core.adapt.warm_up import warm_up_roles
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.effects import AssignTerms, Effect, PublishLayout
from cascadeinfer.core.events import Event, InstanceJoined, LayoutAnnounced
from cascadeinfer.core.kind import NO_TERMS, Role
from cascadeinfer.core.layout import RoleLayout, Stage
from cascadeinfer.core.placing.dispatch import Chosen, has_room, nearest_with_room
from cascadeinfer.core.placing.pushing import PrefillStages
from cascadeinfer.core.placing.sharing import SHORT
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.info import Circumstances, PolicyInfo, RoleSearch, Variant
from cascadeinfer.core.view import InstanceView, RequestView


class Roles(Cascade):
    """See the module header."""

    def __init__(
        self,
        *,
        roles: RoleLayout | None = None,
        step_model: StepModel | None = None,
        learning: LearningSettings | None = None,
        overflow: bool = True,
        share: bool = True,
        rebalance: bool = True,
        replan: bool = True,
        planning: PlanSettings | None = None,
        max_queued: int | None = None,
    ) -> None:
        """
        Args:
            roles: The stages to start with; None: one stage that computes and decodes everything.
            step_model: Cost of a step.
            learning: How to learn it from reported steps; None: it stays as it is.
            overflow: Whether a queue of prompts sends a prompt to where it decodes.
            replan: Whether to plan at run time.
            planning: When and how to plan.
            share, rebalance, max_queued: As for `Cascade`.
        """
        super().__init__(
            layout=None if roles is None else roles.stages,
            step_model=step_model,
            learning=learning,
            refine=False,
            replan=False,
            share=share,
            rebalance=rebalance,
            max_queued=max_queued,
        )
        self._overflow = overflow
        self._replans = replan
        self._published: tuple[Stage, ...] = ()
        self._prefill = PrefillStages(roles, self.view, self._target_for)
        self._adaptation = RoleAdaptation(
            self.roster,
            self.view,
            self._prefill,
            models=self._models,
            planning=planning or PlanSettings(),
            replan=replan,
        )
        self._watch = self._adaptation.watch
        self.next_plan = self._adaptation.next_plan

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        if isinstance(event, LayoutAnnounced):
            self._prefill.adopt(event.prefill)
        effects = self._prefill.handle(event, now_s, super().handle)
        if isinstance(event, InstanceJoined) and self._replans and self._came_too_late(event):
            effects.append(AssignTerms(event.cause, event.instance_id, NO_TERMS))
        return self._with_prefill(event.cause, effects)

    def _with_prefill(self, cause: str, effects: list[Effect]) -> list[Effect]:
        """The effects, with the prefill stages in what is published; they are published when they alone change, too."""
        prefill, layout = self._prefill.stages, self.roster.layout
        publishes = any(isinstance(effect, PublishLayout) for effect in effects)
        if not publishes and prefill != self._published and layout is not None:
            effects.append(PublishLayout(cause, layout))
            publishes = True
        if publishes:
            self._published = prefill
        return [replace(effect, prefill=prefill) if isinstance(effect, PublishLayout) else effect for effect in effects]

    def _came_too_late(self, event: InstanceJoined) -> bool:
        """Whether it has come back with the role of a prefill instance, and a plan without it has been made since."""
        named = any(event.instance_id in stage.instance_ids for stage in self._prefill.stages)
        return event.kind.role is Role.PREFILL and not named

    def _follow_roster(self, cause: str, effects: list[Effect], why: str = "") -> None:
        """Also tell when only the prefill stages have changed."""
        before = len(effects)
        super()._follow_roster(cause, effects, why)
        if why and len(effects) == before and self.roster.layout is not None:
            effects.append(PublishLayout(cause, self.roster.layout, why))

    def _place_waiting(self, cause: str, effects: list[Effect]) -> None:
        """Dispatch prompts to prefill instances, and the rest as the cascade does."""
        if self.view.waits():
            effects += self._prefill.dispatches(cause, self._takes_less if self._overflow else None)
        super()._place_waiting(cause, effects)

    def _takes_less(self, request: RequestView, prefill: InstanceView) -> bool:
        """Whether prompts queue there, and this one takes less of everybody's time in its own stage or a longer one."""
        unit = max(prefill.pricing.full_step(prefill.capacity.max_batched_tokens), SHORT * prefill.pricing.base)
        if prefill.backlog <= unit or not self._members:
            return False
        most = _taken(prefill, request.tokens)
        return any(
            _taken(instance, request.tokens) < most and has_room(instance, request.tokens)
            for members in self._members[self._home(request) :]
            for instance in self.view.able(request, members)
        )

    def _target_for(self, request: RequestView) -> Chosen | None:
        stages = [
            [instance for instance in self.view.able(request, members) if instance is not request.place]
            for members in self._members
        ]  # it may be parked on an instance that decodes by now
        return nearest_with_room(stages, self._home(request), request.tokens) if stages else None


def _taken(instance: InstanceView, tokens: int) -> float:
    """Time that a prompt of this length takes of all requests there, its own wait included."""
    computed = instance.pricing.queue_of(tokens) * instance.slowness
    return instance.backlog + (instance.committed_requests + 1) * computed


def _options_for(around: Circumstances) -> dict[str, Any]:
    given = {"roles": around.roles, "step_model": around.step_model, "max_queued": around.max_queued}
    found = {"planning": around.planning, **{option: value for option, value in given.items() if value is not None}}
    if around.follows:
        return found | {"replan": False}
    return found | {"learning": LearningSettings()} if around.learns else found


INFO: Final = PolicyInfo(
    make=Roles,
    help="the cascade with prefill stages and chunk budgets, all in one plan",
    has_queue=True,
    uses_profile=True,
    roles=RoleSearch.FULL,
    options_for=_options_for,
    warm_up=warm_up_roles,
    variants={
        "static": Variant(options={"replan": False}),
        "no-overflow": Variant(options={"overflow": False}),
        "no-share": Variant(options={"share": False}),
    },
)
