"""
What can happen: the closed union of a policy's inputs.

Events are data, never behaviour. Each carries `cause`, the id of what brought it about (a request, a report's sequence
number, an effect), so that a log of events and effects tells each request's story. Time is not in an event: it is the
second argument of `Policy.handle`.

An event is a fact: the policy's books follow it at once. In particular a request is where the last `Dispatch` or
`MigrationEnded` put it, and during a migration it counts at its source.
"""

import enum
from dataclasses import dataclass
from typing import TypeAlias

from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import BalanceMessage
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId


class PinReason(enum.StrEnum):
    """Why a request may not migrate: its state would not survive the move unchanged."""

    SEEDED_SAMPLING = "seeded_sampling"
    TOKEN_PENALTIES = "token_penalties"  # noqa: S105 - sampling penalties, not a secret
    PROMPT_LOGPROBS = "prompt_logprobs"
    POOLING = "pooling"
    MULTIMODAL = "multimodal"
    LORA = "lora"
    STREAMING_INPUT = "streaming_input"
    BAD_WORDS = "bad_words"
    PROMPT_EMBEDS = "prompt_embeds"
    REASONING_GRAMMAR = "reasoning_grammar"
    CUSTOM_SAMPLING = "custom_sampling"
    ENGINE = "engine"
    """The engine's configuration rules live migration out for every request."""


class MigrationOutcome(enum.StrEnum):
    """How a migration ended."""

    MOVED = "moved"
    """The request decodes on the target and its KV cache was pulled."""
    RECOMPUTED = "recomputed"
    """The request decodes on the target, which recomputed its KV cache."""
    STAYED = "stayed"
    """The request never left the source; nothing changed."""
    ENDED = "ended"
    """The request ended (finished, was aborted) before the move was complete."""
    LOST = "lost"
    """
    The instance that had the request died on the way, or was to compute it anew and does not answer.

    The `InstanceLost` or `InstanceSuspected` that follows names it.
    """


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """
    An instance's load at one moment, between two steps.

    `running_ids` and `running_tokens` (prompt + output so far) run in parallel, as do the two for waiting requests.

    Attributes:
        kv_blocks_used: Blocks in use (not free and not merely cached).
        step_s: Mean duration of the steps since the last report in seconds, 0.0 when there was none.
        steps: Those steps, each with what was in it, as the engine timed them; empty when it does not.
        foreign_running_tokens: Lengths of running requests that belong to other front-end processes: load here, but not ours to move.
        foreign_waiting_tokens: Lengths of their waiting requests.

    """

    running_ids: tuple[RequestId, ...]
    running_tokens: tuple[int, ...]
    waiting_ids: tuple[RequestId, ...]
    waiting_tokens: tuple[int, ...]
    kv_blocks_used: int
    step_s: float = 0.0
    steps: tuple[StepSample, ...] = ()
    foreign_running_tokens: tuple[int, ...] = ()
    foreign_waiting_tokens: tuple[int, ...] = ()

    @property
    def n_running(self) -> int:
        """Requests that run, whosever they are."""
        return len(self.running_ids) + len(self.foreign_running_tokens)

    @property
    def n_waiting(self) -> int:
        """Requests that wait, whosever they are."""
        return len(self.waiting_ids) + len(self.foreign_waiting_tokens)


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """
    A new request waits for its `Dispatch` (or `Reject`).

    Attributes:
        max_output_tokens: The request's own cap; the policy must not take it for a forecast.
        prefix_hashes: Hashes of the prompt's leading blocks, each covering all before it; empty when unknown.
        pin_reason: Why this request may never migrate, or None.
        priority: vLLM's meaning: lower runs earlier.

    """

    cause: str
    request_id: RequestId
    prompt_tokens: int
    max_output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    pin_reason: PinReason | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request ended: it finished, failed or was aborted by its client. Its id is free again."""

    cause: str
    request_id: RequestId
    output_tokens: int


@dataclass(frozen=True, slots=True)
class InstanceReported:
    """An instance said how loaded it is. Shells report every 50 to 250 ms, not every step."""

    cause: str
    instance_id: InstanceId
    report: InstanceReport


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """An instance is ready to take requests (first start, restart or scale-out)."""

    cause: str
    instance_id: InstanceId
    kind: InstanceKind


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """An instance takes no new requests; those it has move away or finish. `InstanceLost` follows when it is gone."""

    cause: str
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """
    An instance is gone. Each id in `orphan_ids` needs a new `Dispatch`; its KV cache is lost.

    Attributes:
        orphan_ids: Requests that were there, with `orphan_tokens` (prompt + output so far) in parallel.

    """

    cause: str
    instance_id: InstanceId
    orphan_ids: tuple[RequestId, ...] = ()
    orphan_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceSuspected:
    """
    An instance's report is overdue: it hangs, or is very slow. Nothing new goes there while another can take it.

    Each id in `withdrawn_ids` needs a new `Dispatch`: it waited there without a token, and has been taken away. May come again with others.
    """

    cause: str
    instance_id: InstanceId
    withdrawn_ids: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceTrusted:
    """An instance that was suspected answers in time again."""

    cause: str
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """
    A migration that `StartMigration` asked for is over. Exactly one follows each `StartMigration`.

    Attributes:
        outcome: Where the request is now follows from it: the target for MOVED and RECOMPUTED, else the source or nowhere.
        detail: A short reason, e.g. `refused:no_room`; a metric label, so from a small set.

    """

    cause: str
    migration_id: MigrationId
    request_id: RequestId
    source_id: InstanceId
    target_id: InstanceId
    outcome: MigrationOutcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A message of the bid-ask protocol reached its recipient's agent (late, or never, is allowed)."""

    cause: str
    sender_id: InstanceId
    recipient_id: InstanceId
    message: BalanceMessage


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that `Policy.next_timer_s` asked for has come."""

    cause: str


@dataclass(frozen=True, slots=True)
class LayoutAnnounced:
    """The front-end process that plans for all has put these stages in force; a policy that has stages follows."""

    cause: str
    layout: StageLayout


@dataclass(frozen=True, slots=True)
class SeenEnd:
    """A request of another process that ended: its lengths in tokens, and when it came."""

    prompt_tokens: int
    output_tokens: int
    arrived_s: float


@dataclass(frozen=True, slots=True)
class SeenLive:
    """A request of another process that runs or waits: when it came, its lengths in tokens so far, its own cap on the output."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int


@dataclass(frozen=True, slots=True)
class WorkloadSeen:
    """
    What another front-end process has seen since it last said so, for the one that plans for all. Times are on this policy's clock.

    Attributes:
        source: Which process.
        n_arrived: Requests that came to it.
        ended: Those that ended.
        unfinished: Those that run or wait now.

    """

    cause: str
    source: str
    n_arrived: int
    ended: tuple[SeenEnd, ...]
    unfinished: tuple[SeenLive, ...]


Event: TypeAlias = (
    RequestArrived
    | RequestFinished
    | InstanceReported
    | InstanceJoined
    | InstanceDraining
    | InstanceLost
    | InstanceSuspected
    | InstanceTrusted
    | MigrationEnded
    | MessageReceived
    | LayoutAnnounced
    | WorkloadSeen
    | TimerFired
)
