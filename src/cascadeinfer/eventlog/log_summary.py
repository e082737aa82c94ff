"""An event log in figures: rates, lengths, migrations by reason and outcome, layouts in force, and failures."""

from collections import Counter
from dataclasses import dataclass, field

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
    InstanceChanged,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceSuspected,
    InstanceTrusted,
    MigrationEnded,
    RequestArrived,
    RequestFinished,
)
from cascadeinfer.core.types import InstanceId, MigrationId
from cascadeinfer.eventlog.reader import Gap, LogReader


@dataclass
class LogSummary:
    """
    The figures of an event log.

    Attributes:
        first_s: The shell's clock at the first event.
        last_s: The shell's clock at the last event.
        events: Number of events by kind.
        failed: Number of events at which the policy raised.
        missing: Number of events that are not in the log.
        dispatches: Number of dispatches by instance.
        migrations: Ended migrations by reason, outcome and detail; the reason is `unknown` if the log lacks their
            start.
        messages: Bid-ask messages sent, by kind.
        memberships: Instances that came, went or changed: time, change, instance.
        layouts: Layouts, each with the time from which it was in force, and why.
        advice: Numbers of instances that the policy has advised, each with its time.
    """

    first_s: float | None = None
    last_s: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    missing: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    rejected: int = 0
    dispatches: Counter[InstanceId] = field(default_factory=Counter)
    migrations: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    memberships: list[tuple[float, str, InstanceId]] = field(default_factory=list)
    layouts: list[tuple[float, PublishLayout]] = field(default_factory=list)
    advice: list[tuple[float, AdviseScale]] = field(default_factory=list)
    _reasons: dict[MigrationId, str] = field(default_factory=dict)

    @property
    def span_s(self) -> float:
        """Seconds from the first event to the last."""
        return 0.0 if self.first_s is None else self.last_s - self.first_s

    @property
    def arrived(self) -> int:
        """Number of requests that arrived."""
        return self.events["RequestArrived"]

    @property
    def finished(self) -> int:
        """Requests that ended, refused ones included."""
        return self.events["RequestFinished"]

    def note_event(self, at_s: float, event: Event) -> None:
        """Count an event."""
        self.first_s = at_s if self.first_s is None else self.first_s
        self.last_s = at_s
        self.events[type(event).__name__] += 1
        match event:
            case RequestArrived():
                self.prompt_tokens += event.prompt_tokens
            case RequestFinished():
                self.output_tokens += event.output_tokens
            case MigrationEnded():
                reason = self._reasons.pop(event.migration_id, "unknown")
                self.migrations[reason, event.outcome.value, event.detail] += 1
            case InstanceJoined():
                self.memberships.append((at_s, "joined", event.instance_id))
            case InstanceChanged():
                tokens = event.kind.capacity.max_batched_tokens
                what = f"became {event.kind.role}, at most {tokens} tokens in a step,"
                self.memberships.append((at_s, what, event.instance_id))
            case InstanceDraining():
                self.memberships.append((at_s, "draining", event.instance_id))
            case InstanceLost():
                orphans = f" with {len(event.orphan_ids)} requests" if event.orphan_ids else ""
                self.memberships.append((at_s, f"lost{orphans}", event.instance_id))
            case InstanceSuspected():
                withdrawn = f" with {len(event.withdrawn_ids)} requests" if event.withdrawn_ids else ""
                self.memberships.append((at_s, f"suspected{withdrawn}", event.instance_id))
            case InstanceTrusted():
                self.memberships.append((at_s, "trusted", event.instance_id))
            case _:
                return

    def note_effect(self, at_s: float, effect: Effect) -> None:
        """Count an effect."""
        match effect:
            case Dispatch():
                self.dispatches[effect.instance_id] += 1
            case Reject():
                self.rejected += 1
            case StartMigration():
                self._reasons[effect.migration_id] = effect.reason.value
            case SendMessage():
                self.messages[type(effect.message).__name__] += 1
            case PublishLayout():
                self.layouts.append((at_s, effect))
            case AdviseScale():
                self.advice.append((at_s, effect))
            case AssignTerms():
                pass  # its end is counted


def summarise_log(log: LogReader) -> LogSummary:
    """
    Count everything.

    Raises:
        EventLogError: The log cannot be read to its end.
    """
    summary = LogSummary()
    for entry in log:
        if isinstance(entry, Gap):
            summary.missing += entry.count
            continue
        summary.note_event(entry.at_s, entry.event)
        summary.failed += entry.failed is not None
        for effect in entry.effects:
            summary.note_effect(entry.at_s, effect)
    return summary
