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

Stages, threshold and chunk budgets stay as planned: boundaries do not move and nothing is planned anew while it runs,
because neither refinement nor replanning knows prefill stages yet. With a plan without prefill stages it is the cascade
with fixed ranges.

Edge cases: those of `core/placing/pushing.py`. Inputs read: those of the cascade. Source: arXiv 2512.19179 for the
stages, DistServe (arXiv 2401.09670) for the prefill instances.
"""

from typing import Any, Final

from cascadeinfer.core.adapt.warm_up import warm_up
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import RoleLayout
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
        max_queued: int | None = None,
    ) -> None:
        """
        Args:
            roles: The stages; None: one stage that computes and decodes everything.
            step_model: Cost of a step.
            learning: How to learn it from reported steps; None: it stays as it is.
            overflow: Whether a queue of prompts sends a prompt to where it decodes.
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
        self._prefill = PrefillStages(roles, self.view, self._target_for)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        return self._prefill.handle(event, now_s, super().handle)

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
        stages = [self.view.able(request, members) for members in self._members]
        return nearest_with_room(stages, self._home(request), request.tokens) if stages else None


def _taken(instance: InstanceView, tokens: int) -> float:
    """Time that a prompt of this length takes of all requests there, its own wait included."""
    computed = instance.pricing.queue_of(tokens) * instance.slowness
    return instance.backlog + (instance.committed_requests + 1) * computed


def _options_for(around: Circumstances) -> dict[str, Any]:
    given = {"roles": around.roles, "step_model": around.step_model, "max_queued": around.max_queued}
    found = {option: value for option, value in given.items() if value is not None}
    return found | {"learning": LearningSettings()} if around.learns and not around.follows else found


INFO: Final = PolicyInfo(
    make=Roles,
    help="the cascade with prefill stages and chunk budgets, all in one plan",
    has_queue=True,
    uses_profile=True,
    roles=RoleSearch.FULL,
    options_for=_options_for,
    warm_up=warm_up,
    variants={
        "no-overflow": Variant(options={"overflow": False}),
        "no-share": Variant(options={"share": False}),
    },
)
