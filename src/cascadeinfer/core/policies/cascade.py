"""
CascadeInfer: length stages that plan themselves, hand-over by bid-ask, boundaries that follow the workload.

The life of a request: it is dispatched to the cheapest instance in the stage of its prompt length
(`core/placing/dispatch.py`). If no instance there has room, it goes to the nearest stage with room, the longer one
first. While prompts queue there, it goes where it starts sooner (`core/placing/sharing.py`). If the beginning of its
prompt is cached elsewhere and that is worth more, it goes there (`core/placing/affinity.py`). As it grows, its
instance's agent hands it over to the next stage (`core/bidask`), moves it within the stage when the instance is
overloaded, or anywhere when the instance drains. Neighbouring stages adjust their boundary every
`RefineSettings.interval_s`, and the planner looks for a better layout every `PlanSettings.interval_s`. One stage is
load balancing by price, and migration from overloaded to idle instances. A new layout moves nothing at once: requests
that are too long for their stage are handed over like others; those that are too short stay.

Overload: up to `max_queued` requests that fit nowhere wait here, by priority, then arrival; beyond it, the last one is
refused with the time in which the queue should drain (`core/placing/admission.py`). Inputs read: reports, messages, and
the cost model if there is one. Source: arXiv 2512.19179.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cascadeinfer.core.adapt.adaptation import Adaptation, Adapts
from cascadeinfer.core.adapt.boundaries import RefineSettings
from cascadeinfer.core.adapt.replanning import Planner, PlanSettings
from cascadeinfer.core.adapt.step_models import StepModels
from cascadeinfer.core.adapt.warm_up import warm_up
from cascadeinfer.core.bidask.agent import Agent
from cascadeinfer.core.bidask.handover import HandoverRules
from cascadeinfer.core.bidask.rounds import BidAskSettings, Outbox
from cascadeinfer.core.bidask.wake_ups import WakeUps
from cascadeinfer.core.choice import Choice, Rule
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.effects import Dispatch, Effect, PublishLayout, Reject, SendMessage, StartMigration
from cascadeinfer.core.events import (
    Event,
    FirstToken,
    InstanceChanged,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReported,
    InstanceSuspected,
    InstanceTrusted,
    LayoutAnnounced,
    MessageReceived,
    MigrationEnded,
    MigrationOutcome,
    RequestArrived,
    RequestFinished,
    TimerFired,
    WorkloadSeen,
)
from cascadeinfer.core.kind import InstanceKind, StepModelKey
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.placing.admission import DrainRate, to_refuse
from cascadeinfer.core.placing.affinity import PrefixAffinity
from cascadeinfer.core.placing.dispatch import TYPICAL_OUTPUT_TOKENS, Chosen, cheapest, nearest_with_room, pricing_of
from cascadeinfer.core.placing.sharing import relief_for
from cascadeinfer.core.policies.info import Circumstances, PolicyInfo, Variant
from cascadeinfer.core.roster import Roster
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import ClusterView, InstanceView, Pricing, RequestView

PARTS: Final = ("refine", "rebalance", "affinity", "replan", "migrate", "share")
"""Options that switch a part off, for ablation studies."""


class Cascade:
    """The whole system as one policy. See the module header."""

    def __init__(
        self,
        *,
        layout: StageLayout | None = None,
        step_model: StepModel | None = None,
        step_models: Mapping[StepModelKey, StepModel] | None = None,
        planner: Planner | None = None,
        learning: LearningSettings | None = None,
        refine: bool = True,
        rebalance: bool = True,
        replan: bool = True,
        migrate: bool = True,
        affinity: bool = True,
        share: bool = True,
        max_queued: int | None = None,
        retry_after_s: float = 1.0,
        balance: BidAskSettings | None = None,
        handover: HandoverRules | None = None,
        refinement: RefineSettings | None = None,
        planning: PlanSettings | None = None,
    ) -> None:
        """
        Args:
            layout: Stages to start with; None: one.
            step_model: Cost of a step. Without it there is no planning, unless `planner` is given.
            step_models: The same of instances of other kinds, by their key (`core/kind.py`).
            planner: Instead of the one that `step_model` gives.
            learning: How to learn from reported steps; None: `step_model` stays as it is.
            refine: Whether boundaries move between plans.
            rebalance: Whether overloaded instances move requests to others of their stage.
            replan: Whether to plan at run time.
            migrate: Whether requests move at all.
            affinity: Whether a request goes where the beginning of its prompt is cached when that pays.
            share: Whether a backlog of prompts in its stage sends a new request elsewhere.
            max_queued: Maximum number of requests that wait here for room; None means that none wait here.
            retry_after_s: `Retry-After` for refused clients while the rate of finishing requests is unknown.
            balance, handover: Parameters of the bid-ask protocol; when a request is handed over.
            refinement, planning: How boundaries move; when and how to plan.
        """
        self._models = StepModels(step_model, step_models, learning)
        self.view = ClusterView(self._price)
        self.roster = Roster(layout)
        self.agents: dict[InstanceId, Agent] = {}
        self._members: list[list[InstanceView]] = []
        self._rebalance = rebalance
        self._migrate = migrate
        self._affinity = PrefixAffinity() if affinity else None
        self._share = share
        self._max_queued = max_queued
        self._retry_after_s = retry_after_s
        self._drain = DrainRate()
        self._balance = balance or BidAskSettings()
        self._handover = handover or HandoverRules()
        self._adaptation: Adapts = Adaptation(
            self.roster,
            self.view,
            models=self._models,
            planner=planner,
            refine=refine,
            replan=replan,
            refinement=refinement or RefineSettings(),
            planning=planning or PlanSettings(),
        )
        self._watch = self._adaptation.watch
        self.next_plan = self._adaptation.next_plan
        self._urgency = 1.0 / TYPICAL_OUTPUT_TOKENS
        self._finished = 0
        self._incarnations: dict[InstanceId, int] = {}
        self._wakes = WakeUps()

    def handle(self, event: Event, now_s: float) -> list[Effect]:  # noqa: C901, PLR0912 - one arm per event
        """See `Policy.handle`."""
        effects: list[Effect] = []
        match event:
            case InstanceReported():
                self.view.apply(event)
                self._observe(event)
                self._review(event.instance_id, event.cause, now_s, effects)
                self._adapt(event.cause, now_s, effects)
                if self._max_queued is not None and self.view.waits():
                    self._place_waiting(event.cause, effects)
            case MessageReceived():
                agent = self.agents.get(event.recipient_id)
                if agent is not None and event.sender_id in self.view.instances:
                    agent.receive(event.sender_id, event.message, now_s, out := Outbox())
                    self._carry_out(event.recipient_id, agent, out, event.cause, effects)
            case TimerFired():
                self._wake(event.cause, now_s, effects)
            case RequestArrived():
                self.view.apply(event)
                self._watch.arrived(event.request_id, now_s)
                self._place_waiting(event.cause, effects)
                self._refuse(event.cause, now_s, effects)
            case RequestFinished():
                self._finish(event, now_s, effects)
            case MigrationEnded():
                self._note_move(event)
                self.view.apply(event)
                for instance_id in (event.source_id, event.target_id):
                    if (agent := self.agents.get(instance_id)) is not None:
                        agent.move_ended(event.migration_id, event.outcome, now_s)
                        self._wakes.at(instance_id, agent.next_wake_s())
            case InstanceJoined() | InstanceDraining() | InstanceLost():
                self.view.apply(event)
                self._follow_membership(event, now_s, effects)
            case InstanceSuspected() | InstanceTrusted():
                self._follow_suspicion(event, effects)
            case LayoutAnnounced():
                self.roster.adopt(event.layout)
                self._follow_roster(event.cause, effects)
            case FirstToken() | InstanceChanged():
                self.view.apply(event)
            case WorkloadSeen():
                self._watch.seen_elsewhere(event, now_s)
        return effects

    def next_timer_s(self) -> float | None:
        """See `Policy.next_timer_s`."""
        return self._wakes.next_s()

    # --- placing ------------------------------------------------------------------------------------------------------

    def _place_waiting(self, cause: str, effects: list[Effect]) -> None:
        """Dispatch what waits, by priority and then arrival. A request without room holds up only its own stage."""
        if not self.view.waits() or not self._members:
            return
        stuck: set[int] = set()
        for request in self.view.unplaced():
            home = self._home(request)
            if home in stuck:
                continue
            able = self.view.able(request, self.view.available())
            if not able:
                continue
            stages = [self.view.able(request, members) for members in self._members]
            right = self._choose(home, request.tokens, stages, able)
            if right is None:
                stuck.add(home)
                if len(stuck) == len(self._members):
                    return
                continue
            relief = relief_for(right.instance, request.tokens, stages) if self._share else None
            chosen = relief or right
            if self._affinity is not None:
                chosen = self._affinity.choose(request, chosen, able)
                self._affinity.note_place(request, chosen.instance.instance_id)
            placed = Dispatch(cause, request.request_id, chosen.instance.instance_id, chosen is relief, chosen.choice)
            self.view.carry_out([placed])
            effects.append(placed)

    def _home(self, request: RequestView) -> int:
        layout = self.roster.layout
        assert layout is not None
        return 0 if len(self._members) == 1 else layout.stage_index_of(request.tokens)

    def _choose(
        self, home: int, tokens: int, stages: Sequence[Sequence[InstanceView]], able: Sequence[InstanceView]
    ) -> Chosen | None:
        if (chosen := nearest_with_room(stages, home, tokens)) is not None:
            return chosen
        if self._max_queued is None:
            return cheapest([i for i in stages[home] if not i.shunned] or able, Rule.NO_ROOM)
        # One as long as the whole cache never has the spare block that `has_room` asks for: an idle instance takes it.
        idle = next((i for i in able if not i.committed_requests and not i.outbound), None)
        return None if idle is None else Chosen(idle, Choice(Rule.IDLE))

    def _note_move(self, event: MigrationEnded) -> None:
        """A moved request took its cache along and left a copy behind for others."""
        request = self.view.requests.get(event.request_id)
        if self._affinity is not None and request is not None and event.outcome is MigrationOutcome.MOVED:
            self._affinity.note_place(request, event.target_id)

    def _refuse(self, cause: str, now_s: float, effects: list[Effect]) -> None:
        """If too many requests wait, refuse the one that would run last."""
        if self._max_queued is None or self.view.waits() <= self._max_queued:
            return
        if (last := to_refuse(self.view.unplaced())) is None:
            return
        retry_after_s = self._drain.retry_after_s(self._max_queued, now_s, self._retry_after_s)
        refused = Reject(cause, last.request_id, "queue_full", retry_after_s)
        self.view.carry_out([refused])
        self._watch.refused(last.request_id)
        effects.append(refused)

    def _finish(self, event: RequestFinished, now_s: float, effects: list[Effect]) -> None:
        request = self.view.requests.get(event.request_id)
        if request is None:
            return
        self._watch.finished(request, event.output_tokens)
        self._learn_urgency(event.output_tokens)
        place = request.place
        if place is not None:
            self._drain.note_end(now_s)
        self.view.apply(event)
        if place is not None and (agent := self.agents.get(place.instance_id)) is not None:
            agent.request_left(event.request_id, out := Outbox())
            self._carry_out(place.instance_id, agent, out, event.cause, effects)
        if self._max_queued is not None:
            self._place_waiting(event.cause, effects)

    def _learn_urgency(self, output_tokens: int) -> None:
        """Follow the mean output length, over which the wait for the first token is amortised: its inverse."""
        self._finished += 1
        self._urgency += (1.0 / max(1, output_tokens) - self._urgency) / min(self._finished + 50, 1000)
        if self._finished % 50 == 0:
            self.view.set_urgency(self._urgency)

    # --- agents -------------------------------------------------------------------------------------------------------

    def _review(self, instance_id: InstanceId, cause: str, now_s: float, effects: list[Effect]) -> None:
        agent = self.agents.get(instance_id)
        if agent is not None and self._migrate:
            agent.review(now_s, out := Outbox())
            self._carry_out(instance_id, agent, out, cause, effects)

    def _wake(self, cause: str, now_s: float, effects: list[Effect]) -> None:
        while (instance_id := self._wakes.take_due(now_s)) is not None:
            agent = self.agents[instance_id]
            agent.wake(now_s, out := Outbox())
            self._carry_out(instance_id, agent, out, cause, effects)

    def _carry_out(self, instance_id: InstanceId, agent: Agent, out: Outbox, cause: str, effects: list[Effect]) -> None:
        """Turn an agent's outbox into effects."""
        effects += [SendMessage(cause, instance_id, recipient_id, message) for recipient_id, message in out.messages]
        for move in out.moves:
            ids = (move.ask_id, move.request_id, instance_id, move.target_id)
            started = StartMigration(cause, *ids, move.reason, move.choice)
            self.view.carry_out([started])
            effects.append(started)
            self.agents[move.target_id].bidder.move_began(move.ask_id)
        self._wakes.at(instance_id, agent.next_wake_s())

    # --- the layout ---------------------------------------------------------------------------------------------------

    def _follow_membership(
        self, event: InstanceJoined | InstanceDraining | InstanceLost, now_s: float, effects: list[Effect]
    ) -> None:
        instance_id = event.instance_id
        if self._models.follow(instance.kind for instance in self.view.instances.values()):
            self.view.reprice(self._price)
        if isinstance(event, InstanceJoined):
            number = self._incarnations[instance_id] = self._incarnations.get(instance_id, 0) + 1
            self.roster.succeed(instance_id, event.replaces)
            self.agents[instance_id] = Agent(
                self.view.instances[instance_id],
                self.view.requests,
                self.roster,
                name=f"{instance_id}.{number}",
                settings=self._balance,
                rules=self._handover,
                able=self.view.able_ids,
                extra_s=self.view.links.extra_s,
                rebalance=self._rebalance,
            )
        elif isinstance(event, InstanceLost):
            self.agents.pop(instance_id, None)
            self._wakes.forget(instance_id)
            if self._affinity is not None:
                self._affinity.forget(instance_id)
        self._follow_roster(event.cause, effects)
        self._place_waiting(event.cause, effects)
        if isinstance(event, InstanceDraining):
            self._review(instance_id, event.cause, now_s, effects)

    def _follow_suspicion(self, event: InstanceSuspected | InstanceTrusted, effects: list[Effect]) -> None:
        """Keep the stages; requests that waited at an instance that does not answer are placed elsewhere."""
        self.view.apply(event)
        agent = self.agents.get(event.instance_id)
        if isinstance(event, InstanceSuspected) and agent is not None:
            out = Outbox()
            for request_id in event.withdrawn_ids:
                agent.request_left(request_id, out)
            self._carry_out(event.instance_id, agent, out, event.cause, effects)
        self._place_waiting(event.cause, effects)

    def _observe(self, event: InstanceReported) -> None:
        """Learn from the reported steps, unless something other than their content made them long."""
        instance = self.view.instances.get(event.instance_id)
        if instance is not None and instance.lag == 1.0:
            self._models.observe(instance.kind.step_model_key, event.report.steps)

    def _follow_roster(self, cause: str, effects: list[Effect], why: str = "") -> None:
        """Put the wanted layout into force with the instances that are up."""
        changed = self.roster.follow([instance.instance_id for instance in self.view.members()])
        layout = self.roster.layout
        stages = () if layout is None else layout.stages
        self._members = [[self.view.instances[i] for i in stage.instance_ids] for stage in stages]
        if changed and layout is not None:
            effects.append(PublishLayout(cause, layout, why))

    def _price(self, kind: InstanceKind) -> Pricing:
        return pricing_of(self._models.pricing(kind.step_model_key), kind.capacity)

    def _adapt(self, cause: str, now_s: float, effects: list[Effect]) -> None:
        """Learn, replan or move boundaries when due."""
        if self.roster.layout is None:
            return
        adapted = self._adaptation.step(self._members, now_s)
        if adapted.models:
            self.view.reprice(self._price)
        if adapted.layout:
            self._follow_roster(cause, effects, adapted.layout)
        effects += adapted.told(cause, self.roster.layout)


def _options_for(around: Circumstances) -> dict[str, Any]:
    """Stages, costs and bounds as known. A policy that follows another process neither plans, refines nor learns."""
    given = {"layout": around.layout, "step_model": around.step_model, "max_queued": around.max_queued}
    found = {"planning": around.planning, **{option: value for option, value in given.items() if value is not None}}
    if around.follows:
        return found | {"refine": False, "replan": False}
    return found | {"learning": LearningSettings()} if around.learns else found


INFO: Final = PolicyInfo(
    make=Cascade,
    help="stages that plan themselves; requests move as they grow, and for balance",
    takes_layout=True,
    starts_with_plan=True,
    has_queue=True,
    uses_profile=True,
    options_for=_options_for,
    warm_up=warm_up,
    variants={
        "cold": Variant(starts_with_plan=False),
        "static": Variant(options={"refine": False, "replan": False}),  # keeps the first plan
        **{f"no-{part}": Variant(options={part: False}) for part in PARTS},
    },
)
