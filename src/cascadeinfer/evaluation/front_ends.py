"""
Several front-end processes in the simulator: each has a policy of its own and decides for its own requests.

It stands for what the server does (`frontend/processes`): the first process plans for all and announces its stages, the
others follow; each hears the load reports of all instances, in which the requests of the others are load without names;
every `SUMMARY_S` the first one hears what the others have seen. Requests go to the processes in turn. Messages between
processes take no time here; on a machine they take less than a millisecond.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from cascadeinfer.core.effects import (
    AdviseScale,
    AssignTerms,
    Dispatch,
    Effect,
    PublishLayout,
    Reject,
    SendMessage,
    StartMigration,
)
from cascadeinfer.core.events import (
    Event,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    InstanceSuspected,
    LayoutAnnounced,
    MessageReceived,
    MigrationEnded,
    RequestArrived,
    RequestFinished,
    SeenEnd,
    SeenLive,
    TimerFired,
    WorkloadSeen,
)
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import RequestId

SUMMARY_S: Final = 0.25
"""As in `frontend/processes/follower.py`."""


class _FrontEnd:
    """
    One process.

    Attributes:
        policy: Its own.
        live: Its requests: arrival time, prompt tokens, output tokens so far, the cap on them.
        n_arrived: Requests that arrived since its last summary.
        ended: Those that ended since then.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.live: dict[RequestId, SeenLive] = {}
        self.n_arrived = 0
        self.ended: list[SeenEnd] = []

    def summary(self, index: int) -> WorkloadSeen:
        """What the process that plans for all hears of this one."""
        seen = WorkloadSeen(
            f"process:{index}", str(index), self.n_arrived, tuple(self.ended), tuple(self.live.values())
        )
        self.n_arrived, self.ended = 0, []
        return seen


class SeveralFrontEnds:
    """See the module header, and `cascadeinfer.core.policy.Policy`: the processes together, as one policy."""

    def __init__(self, first: Policy, followers: Sequence[Policy]) -> None:
        """
        Args:
            first: Plans for all.
            followers: Made with `Circumstances.follows`.
        """
        self._front_ends = [_FrontEnd(policy) for policy in (first, *followers)]
        self._owner: dict[RequestId, int] = {}
        self._n_arrived = 0
        self._summary_due_s = SUMMARY_S

    def next_timer_s(self) -> float | None:
        """See Policy."""
        due = [due_s for each in self._front_ends if (due_s := each.policy.next_timer_s()) is not None]
        return min(due, default=None)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy."""
        effects: list[Effect] = []
        for index, own in self._dealt(event, now_s):
            self._hand(index, own, now_s, effects)
        if now_s >= self._summary_due_s:
            self._summary_due_s = now_s + SUMMARY_S
            for index, front_end in enumerate(self._front_ends[1:], 1):
                self._hand(0, front_end.summary(index), now_s, effects)
        return effects

    def _dealt(self, event: Event, now_s: float) -> list[tuple[int, Event]]:
        """Who hears of an event, and what of it."""
        match event:
            case RequestArrived() | RequestFinished() | MigrationEnded() | MessageReceived():
                return [self._to_its_owner(event, now_s)]
            case TimerFired():
                return [(index, event) for index in range(len(self._front_ends)) if self._is_due(index, now_s)]
            case InstanceReported():
                self._note_lengths(event.report)
            case _:
                pass
        return [(index, self._as_seen_by(index, event)) for index in range(len(self._front_ends))]

    def _to_its_owner(
        self, event: RequestArrived | RequestFinished | MigrationEnded | MessageReceived, now_s: float
    ) -> tuple[int, Event]:
        match event:
            case RequestArrived():
                index = self._owner[event.request_id] = self._n_arrived % len(self._front_ends)
                self._n_arrived += 1
                front_end = self._front_ends[index]
                front_end.n_arrived += 1
                front_end.live[event.request_id] = SeenLive(now_s, event.prompt_tokens, 0, event.max_output_tokens)
                return index, event
            case RequestFinished():
                index = self._owner.pop(event.request_id)
                self._note_end(self._front_ends[index], event)
                return index, event
            case MigrationEnded():
                index, own_id = _unpacked(event.migration_id)
                return index, replace(event, migration_id=own_id)
            case MessageReceived():
                packed: Any = event.message
                index, message = packed
                return index, replace(event, message=message)

    def _as_seen_by(self, index: int, event: Event) -> Event:
        """An event about an instance, without the names of the others' requests."""
        match event:
            case InstanceReported():
                return replace(event, report=self._report_as_seen_by(index, event.report))
            case InstanceLost():
                own, _ = self._split(index, event.orphan_ids, event.orphan_tokens)
                return replace(event, orphan_ids=tuple(r for r, _ in own), orphan_tokens=tuple(t for _, t in own))
            case InstanceSuspected():
                return replace(event, withdrawn_ids=tuple(r for r in event.withdrawn_ids if self._is_of(index, r)))
            case _:
                return event

    def _is_due(self, index: int, now_s: float) -> bool:
        due_s = self._front_ends[index].policy.next_timer_s()
        return due_s is not None and due_s <= now_s

    def _hand(self, index: int, event: Event, now_s: float, effects: list[Effect]) -> None:
        """Hand an event to a process and collect its effects, under names that differ from those of the others."""
        for effect in self._front_ends[index].policy.handle(event, now_s):
            match effect:
                case PublishLayout():
                    if index == 0:
                        effects.append(effect)
                        announced = LayoutAnnounced(effect.cause, effect.layout, effect.prefill)
                        for follower in range(1, len(self._front_ends)):
                            self._hand(follower, announced, now_s, effects)
                case AdviseScale() | AssignTerms():
                    if index == 0:
                        effects.append(effect)
                case StartMigration():
                    effects.append(replace(effect, migration_id=f"{index}/{effect.migration_id}"))
                case SendMessage():
                    message: Any = (index, effect.message)
                    effects.append(replace(effect, message=message))
                case Dispatch() | Reject():
                    effects.append(effect)

    # --- what each sees ----------------------------------------------------------------------------------------------

    def _is_of(self, index: int, request_id: RequestId) -> bool:
        return self._owner.get(request_id) == index

    def _report_as_seen_by(self, index: int, report: InstanceReport) -> InstanceReport:
        """A load report in which the requests of the others have no names."""
        running, foreign_running = self._split(index, report.running_ids, report.running_tokens)
        waiting, foreign_waiting = self._split(index, report.waiting_ids, report.waiting_tokens)
        return replace(
            report,
            running_ids=tuple(r for r, _ in running),
            running_tokens=tuple(t for _, t in running),
            waiting_ids=tuple(r for r, _ in waiting),
            waiting_tokens=tuple(t for _, t in waiting),
            foreign_running_tokens=(*report.foreign_running_tokens, *foreign_running),
            foreign_waiting_tokens=(*report.foreign_waiting_tokens, *foreign_waiting),
        )

    def _split(
        self, index: int, request_ids: Sequence[RequestId], tokens: Sequence[int]
    ) -> tuple[list[tuple[RequestId, int]], list[int]]:
        own, foreign = [], []
        for request_id, length in zip(request_ids, tokens, strict=True):
            if self._is_of(index, request_id):
                own.append((request_id, length))
            else:
                foreign.append(length)
        return own, foreign

    def _note_lengths(self, report: InstanceReport) -> None:
        for request_id, tokens in zip(report.running_ids, report.running_tokens, strict=True):
            index = self._owner.get(request_id)
            if index is not None:
                live = self._front_ends[index].live
                live[request_id] = replace(
                    live[request_id], output_tokens=max(0, tokens - live[request_id].prompt_tokens)
                )

    @staticmethod
    def _note_end(front_end: _FrontEnd, event: RequestFinished) -> None:
        live = front_end.live.pop(event.request_id)
        front_end.ended.append(SeenEnd(live.prompt_tokens, event.output_tokens, live.arrived_s))


def _unpacked(migration_id: str) -> tuple[int, str]:
    index, _, own_id = migration_id.partition("/")
    return int(index), own_id
