"""One request's story from an event log, in words: what happened to it, when, where and why."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.effects import Dispatch, Effect, PublishLayout, Reject, SendMessage, StartMigration
from cascadeinfer.core.errors import EventLogError
from cascadeinfer.core.events import (
    Event,
    FirstToken,
    InstanceLost,
    InstanceReported,
    MigrationEnded,
    MigrationOutcome,
    RequestArrived,
    RequestFinished,
)
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import Accept, Advert, Ask, Award, Bid, Decline, Withdraw
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, RequestId
from cascadeinfer.eventlog.choice_words import reason
from cascadeinfer.eventlog.reader import Gap, LogReader

MOST_NAMED: Final = 5
"""Most requests named when the beginning of an id fits several."""
OUTCOMES: Final = {
    MigrationOutcome.MOVED: "moved with its KV cache",
    MigrationOutcome.RECOMPUTED: "moved, its KV cache computed anew",
    MigrationOutcome.STAYED: "stayed",
    MigrationOutcome.ENDED: "ended before the move was complete",
    MigrationOutcome.LOST: "lost with the instance that had it",
}


@dataclass(frozen=True, slots=True)
class Chapter:
    """One step of the story."""

    at_s: float
    text: str


def find_request(log: LogReader, beginning: str) -> RequestId:
    """
    The request with this id, or the only one whose id begins with it.

    Raises:
        EventLogError: There is none, or there are several.
    """
    found: dict[RequestId, None] = {}
    for entry in log:
        if isinstance(entry, Gap):
            continue
        for request_id in _named(entry.event):
            if request_id == beginning:
                return request_id
            if request_id.startswith(beginning):
                found[request_id] = None
    if not found:
        raise EventLogError(f"no request {beginning!r} in {log.paths[-1]}")
    if len(found) > 1:
        shown = ", ".join(list(found)[:MOST_NAMED])
        raise EventLogError(
            f"{len(found)} requests begin with {beginning!r}: {shown}{' ...' if len(found) > MOST_NAMED else ''}"
        )
    return next(iter(found))


def _named(event: Event) -> tuple[RequestId, ...]:
    match event:
        case RequestArrived() | RequestFinished() | MigrationEnded():
            return (event.request_id,)
        case InstanceReported():
            return event.report.running_ids + event.report.waiting_ids
        case _:
            return ()


@dataclass
class Telling:
    """
    Tells what events and effects mean for one request.

    Attributes:
        request_id: The request.
        layout: The stages in force at what is told next.
        tokens: Its length then.
    """

    request_id: RequestId
    layout: StageLayout | None = None
    asks: set[str] = field(default_factory=set)
    waiting: bool = True
    tokens: int = 0

    def of(self, what: Event | Effect) -> Iterator[str]:
        """Describe what an event means for the request, or an effect does to it."""
        return self.of_event(what) if isinstance(what, Event) else self.of_effect(what)

    def of_event(self, event: Event) -> Iterator[str]:
        """Describe what an event means for the request."""
        me = self.request_id
        match event:
            case RequestArrived(request_id=request_id) if request_id == me:
                pinned = f"; it may not move: {event.pin_reason.value}" if event.pin_reason is not None else ""
                yield f"arrived: {event.prompt_tokens} prompt tokens, at most {event.max_output_tokens} more{pinned}"
                self.waiting, self.tokens = True, event.prompt_tokens
            case FirstToken(request_id=request_id) if request_id == me:
                self.waiting, self.tokens = False, self.tokens + 1
                yield f"has its first token and is parked on {event.instance_id}"
            case RequestFinished(request_id=request_id) if request_id == me:
                yield f"ended after {event.output_tokens} output tokens"
            case InstanceReported():
                yield from self._of_report(event)
            case InstanceLost() if me in event.orphan_ids:
                yield (
                    f"lost its instance {event.instance_id} at {event.orphan_tokens[event.orphan_ids.index(me)]} tokens"
                )
                self.waiting = True
            case MigrationEnded(request_id=request_id) if request_id == me:
                detail = f" ({event.detail})" if event.detail else ""
                moved = event.outcome in {MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED}
                where = f", now on {self.place(event.target_id)}" if moved else ""
                ahead = f", {event.copied_tokens} tokens were copied ahead" if event.copied_tokens else ""
                yield f"migration {event.migration_id} is over: {OUTCOMES[event.outcome]}{detail}{where}{ahead}"
            case _:
                return

    def _of_report(self, event: InstanceReported) -> Iterator[str]:
        report = event.report
        if self.request_id in report.running_ids:
            self.tokens = report.running_tokens[report.running_ids.index(self.request_id)]
            if self.waiting:
                self.waiting = False
                yield f"runs on {event.instance_id} ({self.tokens} tokens, {len(report.running_ids)} running there)"

    def of_effect(self, effect: Effect) -> Iterator[str]:
        """Describe what an effect does to the request."""
        me = self.request_id
        match effect:
            case Dispatch(request_id=request_id) if request_id == me:
                why = ", because prompts queue in its stage" if effect.shared else ""
                until = ", to be parked with its first token" if effect.park else ""
                yield f"dispatched to {self.place(effect.instance_id)}{why}{until}"
                if effect.choice is not None:
                    yield f"why {effect.instance_id}: {reason(effect.choice)}"
            case Reject(request_id=request_id) if request_id == me:
                yield f"refused: {effect.reason}; its client may come again after {effect.retry_after_s:g} s"
            case StartMigration(request_id=request_id) if request_id == me:
                cause = effect.reason.value.replace("_", " ")
                yield (
                    f"migration {effect.migration_id} begins at {self.tokens} tokens, {effect.source_id} to "
                    f"{self.place(effect.target_id)}: {cause}"
                )
                if effect.choice is not None:
                    yield f"why {effect.target_id}: {reason(effect.choice)}"
            case SendMessage():
                yield from self._of_message(effect)
            case PublishLayout():
                self.layout = effect.layout
            case _:
                return

    def _of_message(self, effect: SendMessage) -> Iterator[str]:
        sender, recipient, message = effect.sender_id, effect.recipient_id, effect.message
        if isinstance(message, Ask) and message.request_id == self.request_id:
            self.asks.add(message.ask_id)
        if isinstance(message, Advert) or message.ask_id not in self.asks:
            return
        match message:
            case Ask():
                yield (
                    f"{sender} asks {recipient} to take it ({message.length_tokens} tokens, "
                    f"{message.reason.replace('_', ' ')})"
                )
            case Bid():
                yield (
                    f"{sender} bids: load {message.load:.2f}, price {message.price:.3g}, {message.free_blocks} "
                    "free blocks"
                )
            case Award():
                yield f"{sender} awards it to {recipient}"
            case Accept():
                yield f"{sender} keeps a place for it"
            case Decline():
                yield f"{sender} declines: {message.reason.replace('_', ' ')}"
            case Withdraw():
                yield f"{sender} asks {recipient} no more"

    def place(self, instance_id: InstanceId) -> str:
        """An instance with its stage's range."""
        stage = None if self.layout is None else self.layout.stage_index_of_instance(instance_id)
        if self.layout is None or stage is None or len(self.layout.stages) == 1:
            return instance_id
        lengths = self.layout.stages[stage].range
        upper = "" if lengths.hi_tokens >= UNBOUNDED_TOKENS else str(lengths.hi_tokens)
        return f"{instance_id} (stage {stage}: {lengths.lo_tokens}-{upper} tokens)"


def story_of(log: LogReader, request_id: RequestId) -> Iterator[Chapter]:
    """
    What happened to a request, in order.

    Raises:
        EventLogError: The log cannot be read to its end.
    """
    telling = Telling(request_id)
    for entry in log:
        if isinstance(entry, Gap):
            continue
        for text in telling.of_event(entry.event):
            yield Chapter(entry.at_s, text)
        if entry.failed is not None and request_id in _named(entry.event):
            yield Chapter(entry.at_s, f"the policy failed at this event ({entry.failed})")
        for effect in entry.effects:
            for text in telling.of_effect(effect):
                yield Chapter(entry.at_s, text)
