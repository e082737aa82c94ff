"""
What a policy wants done: the closed union of its outputs.

A shell carries effects out in the order given, each without waiting for the one before to finish. Every effect ends in
an event: `Dispatch` in `RequestFinished` (or `InstanceLost`, or an `InstanceSuspected` that names the request),
`StartMigration` in exactly one `MigrationEnded`, `SendMessage` in at most one `MessageReceived`, `AssignTerms` in at
most one `InstanceChanged`. `cause` is the `cause` of the event that led to the effect.
"""

import enum
from dataclasses import dataclass, field
from typing import TypeAlias

from cascadeinfer.core.choice import Choice
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome
from cascadeinfer.core.kind import InstanceTerms
from cascadeinfer.core.layout import Stage, StageLayout
from cascadeinfer.core.messages import BalanceMessage
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId


class MigrationReason(enum.StrEnum):
    """Why a request should move; a metric label."""

    OUTGREW_STAGE = "outgrew_stage"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    OPERATOR = "operator"
    PREFILLED = "prefilled"
    """Its prompt was computed on an instance for prompts, where it is parked (`core/parking.py`)."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """
    Run this request, which is new, an orphan or withdrawn, on this instance.

    Attributes:
        shared: Whether a backlog in its stage sent it there (`core/placing/sharing.py`).
        park: Whether it stops there with its first token, parked until a `StartMigration` (`core/parking.py`).
        choice: Why there, for operators.
    """

    cause: str
    request_id: RequestId
    instance_id: InstanceId
    shared: bool = False
    choice: Choice | None = field(default=None, compare=False, repr=False)
    park: bool = False


@dataclass(frozen=True, slots=True)
class Reject:
    """
    Refuse a request, at its arrival or later; its client may retry after `retry_after_s` seconds.

    Before its first token the client gets HTTP 429, afterwards an error in the stream. If it runs anywhere, it is
    stopped.
    """

    cause: str
    request_id: RequestId
    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class StartMigration:
    """
    Move a running or parked request with its KV cache. The shell follows the table in `core/migration/`; the outcome
    may be STAYED.

    Attributes:
        choice: Why there, for operators.
    """

    cause: str
    migration_id: MigrationId
    request_id: RequestId
    source_id: InstanceId
    target_id: InstanceId
    reason: MigrationReason
    choice: Choice | None = field(default=None, compare=False, repr=False)

    def ended(self, outcome: MigrationOutcome, detail: str) -> MigrationEnded:
        """The event in which it ends."""
        return MigrationEnded(
            self.cause, self.migration_id, self.request_id, self.source_id, self.target_id, outcome, detail
        )


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Carry a bid-ask message from one instance's agent to another's. It may be lost or late; never delivered twice."""

    cause: str
    sender_id: InstanceId
    recipient_id: InstanceId
    message: BalanceMessage


@dataclass(frozen=True, slots=True)
class PublishLayout:
    """
    The stage layout in force, to be shown to operators and in metrics.

    Attributes:
        layout: The stages in which requests decode.
        why: Human-readable reason for the change; empty when instances came or went.
        failure: What kept the policy from changing it; the layout is then the previous one.
        prefill: The prefill stages, by prompt length.
    """

    cause: str
    layout: StageLayout
    why: str = ""
    failure: str = ""
    prefill: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class AssignTerms:
    """Give an instance another role and token budget from now on, also when it comes back after a failure."""

    cause: str
    instance_id: InstanceId
    terms: InstanceTerms


@dataclass(frozen=True, slots=True)
class AdviseScale:
    """
    How many instances the observed load needs, for whoever adds and removes them; a policy that plans with an SLO says
    it whenever it changes.

    Attributes:
        n_instances: The number; None if no number would keep the SLO.
        why: Human-readable reason.
    """

    cause: str
    n_instances: int | None
    why: str = ""


Effect: TypeAlias = Dispatch | Reject | StartMigration | SendMessage | PublishLayout | AssignTerms | AdviseScale
