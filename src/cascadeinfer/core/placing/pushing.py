"""
Prompts on instances of their own: which of them computes a prompt, and who decodes the request afterwards.

A prompt of at least the layout's threshold goes to the prefill stage of its length, to the instance with room whose
queue is the shortest, and is parked there with its first token (`core/parking.py`). It is then *pushed*: moved to the
instance that the policy names, in order of first tokens. While nobody has room, it stays parked and is tried again with
every report; one that a target refuses is tried again after `RETRY_S`.

A prompt is computed where it decodes, as without prefill stages, when it is shorter than the threshold, when it may not
move, when no instance of its prefill stage has room, and when the policy finds that it would start sooner there.

Edge cases: a prefill stage whose instances are gone is served by the others, the nearest first. An instance that the
layout does not name computes and decodes. A pushed request whose target dies is an orphan and starts anew. A prefill
instance that drains gets no more prompts, and what is parked there is pushed; one that replaces it in a rolling update
takes its place. While nobody that decodes is up, answers and could hold a request, a prefill instance decodes it, too.
"""

from collections.abc import Callable, Sequence
from typing import Final

from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.effects import Dispatch, Effect, MigrationReason, StartMigration
from cascadeinfer.core.events import (
    Event,
    FirstToken,
    InstanceJoined,
    InstanceReported,
    MigrationEnded,
    MigrationOutcome,
)
from cascadeinfer.core.layout import RoleLayout, Stage
from cascadeinfer.core.placing.dispatch import Chosen, first_of, has_room, ranked
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, RequestId
from cascadeinfer.core.view import ClusterView, InstanceView, RequestView

RETRY_S: Final = 0.05
"""Seconds until a request that a target refused is pushed again: the policy's books were wrong, a report puts them
right.
"""


class PrefillStages:
    """
    The prefill stages of a layout, and the requests parked there.

    Attributes:
        stages: The stages, by prompt length; none: every prompt is computed where its request decodes.
    """

    def __init__(
        self, roles: RoleLayout | None, view: ClusterView, target_for: Callable[[RequestView], Chosen | None]
    ) -> None:
        """
        Args:
            roles: The stages; their instances may join later. None: there are no prefill stages.
            view: The policy's books. The instances of prefill stages are set aside in it.
            target_for: The instance that takes a parked request now, or None while nobody has room.
        """
        self.stages: tuple[Stage, ...] = () if roles is None else roles.prefill
        self._view = view
        self._target_for = target_for
        self._parked: dict[RequestId, float] = {}
        self._pushes = 0
        self._set_aside()

    @property
    def threshold_tokens(self) -> int:
        """Prompts of at least this length are computed in these stages; beyond all lengths without any."""
        return self.stages[0].range.lo_tokens if self.stages else UNBOUNDED_TOKENS

    def adopt(self, stages: tuple[Stage, ...]) -> None:
        """
        Have these stages from now on.

        What is parked stays parked and is pushed, by an instance that computes prompts no longer, too. Instances that
        leave the stages count as members and as available again.
        """
        self.stages = stages
        self._set_aside()

    def members(self) -> list[list[InstanceView]]:
        """The instances of each stage that are up and not draining."""
        return [self._members(stage.instance_ids) for stage in self.stages]

    def place_for(self, request: RequestView) -> Chosen | None:
        """The instance that computes this prompt and parks the request; None: it is computed where it decodes."""
        if request.tokens < self.threshold_tokens or request.pin_reason is not None:
            return None
        home = next(index for index, stage in enumerate(self.stages) if request.tokens < stage.range.hi_tokens)
        for index in sorted(range(len(self.stages)), key=lambda index: (abs(index - home), index)):
            members = self._members(self.stages[index].instance_ids)
            if members:
                able = self._view.able(request, members)
                return _shortest_queue([i for i in able if has_room(i, request.tokens)], n_able=len(able))
        return None

    def place_in_need(self, request: RequestView) -> Chosen | None:
        """A prefill instance that also decodes this request, because nobody else can and answers; None otherwise."""
        if self._view.able(request, self._view.available()):
            return None
        every = self._members([instance_id for stage in self.stages for instance_id in stage.instance_ids])
        able = [i for i in self._view.able(request, every) if not i.shunned]
        return _shortest_queue(able, n_able=len(able))

    def dispatches(self, cause: str, stays: Callable[[RequestView, InstanceView], bool] | None = None) -> list[Effect]:
        """
        Dispatch what waits and belongs on a prefill instance; the rest keeps waiting.

        Args:
            cause: Of the effects.
            stays: Whether a request is rather computed where it decodes, though this prefill instance has room.
        """
        effects: list[Effect] = []
        for request in self._view.unplaced():
            chosen = self.place_in_need(request)
            park = chosen is None
            if park:
                chosen = self.place_for(request)
                if chosen is not None and stays is not None and stays(request, chosen.instance):
                    continue
            if chosen is not None:
                self._parked.pop(request.request_id, None)  # it may have been parked on an instance that is gone
                placed = Dispatch(
                    cause, request.request_id, chosen.instance.instance_id, choice=chosen.choice, park=park
                )
                self._view.carry_out([placed])
                effects.append(placed)
        return effects

    def handle(self, event: Event, now_s: float, others: Callable[[Event, float], list[Effect]]) -> list[Effect]:
        """
        A policy's `handle`: pushes what is parked, beside all else that the policy does.

        Args:
            event, now_s: See `Policy.handle`.
            others: The policy's handling of everything but first tokens.
        """
        if isinstance(event, InstanceJoined) and event.replaces is not None:
            self._succeed(event.instance_id, event.replaces)
        if isinstance(event, FirstToken):
            self._view.apply(event)
            self._parked[event.request_id] = now_s
            return self._push(event.cause, now_s)
        effects = others(event, now_s)
        if isinstance(event, MigrationEnded):  # the books know it by now
            self._note_end(event, now_s)
        if isinstance(event, InstanceReported) and self._parked:
            effects += self._push(event.cause, now_s)
        return effects

    def _set_aside(self) -> None:
        self._view.set_aside([instance_id for stage in self.stages for instance_id in stage.instance_ids])

    def _succeed(self, instance_id: InstanceId, replaced_id: InstanceId) -> None:
        """An instance takes over the place of another, which drains, has drained, or still waits for its end."""
        if any(instance_id in stage.instance_ids for stage in self.stages):
            return  # it is back
        self.stages = tuple(
            Stage(stage.range, (*stage.instance_ids, instance_id)) if replaced_id in stage.instance_ids else stage
            for stage in self.stages
        )
        self._set_aside()

    def _note_end(self, event: MigrationEnded, now_s: float) -> None:
        """A migration is over; a request that was not taken stays parked."""
        request = self._view.requests.get(event.request_id)
        if request is not None and request.parked and event.outcome is MigrationOutcome.STAYED:
            self._parked[event.request_id] = now_s + RETRY_S

    def _push(self, cause: str, now_s: float) -> list[Effect]:
        """Push what is parked and has a target, in order of first tokens."""
        effects: list[Effect] = []
        for request_id, from_s in list(self._parked.items()):
            request = self._view.requests.get(request_id)
            if request is None or not request.parked or request.place is None or request.migration_id is not None:
                del self._parked[request_id]
                continue
            target = self._target_for(request) if now_s >= from_s else None
            if target is None:
                continue
            del self._parked[request_id]
            self._pushes += 1
            move = StartMigration(
                cause,
                f"push:{self._pushes}",
                request_id,
                request.place.instance_id,
                target.instance.instance_id,
                MigrationReason.PREFILLED,
                choice=target.choice,
            )
            self._view.carry_out([move])
            effects.append(move)
        return effects

    def _members(self, instance_ids: Sequence[InstanceId]) -> list[InstanceView]:
        present = [self._view.instances[i] for i in instance_ids if i in self._view.instances]
        return [instance for instance in present if not instance.draining]


def _shortest_queue(candidates: Sequence[InstanceView], *, n_able: int) -> Chosen | None:
    """The instance where prompts wait the shortest; among equals the one with the fewest tokens, then the first."""
    order = ranked(Measure.BACKLOG, _backlog, sorted(candidates, key=lambda i: (i.kv_tokens, i.instance_id)))
    n_passed = n_able - len(candidates)
    rule = Rule.BEST_WITH_ROOM if n_passed else Rule.BEST
    return first_of(order, Measure.BACKLOG, _backlog, rule, n_passed=n_passed)


def _backlog(instance: InstanceView) -> float:
    return instance.backlog
