"""
What can happen: the closed union of a policy's inputs.

Events are data, never behaviour. Each carries `cause`, the id of what brought it about (a request, a report's sequence
number, an effect), so that a log of events and effects tells each request's story. Events carry no time: it is the
second argument of `Policy.handle`.

Events are facts; a policy updates its view at once. In particular, a request is where the last `Dispatch` or
`MigrationEnded` put it, and during a migration it counts at its source.
"""

import enum
from dataclasses import dataclass
from typing import TypeAlias

from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import Stage, StageLayout
from cascadeinfer.core.messages import BalanceMessage
from cascadeinfer.core.types import InstanceId, MigrationId, NodeId, RequestId


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
    The request's instance died during the move, or was to recompute the request and does not answer.

    The `InstanceLost` or `InstanceSuspected` that follows names it.
    """


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """
    An instance's load at one moment, between two steps.

    `running_ids` and `running_tokens` (prompt + output so far) are parallel, and so are the two fields for waiting
    requests.

    Attributes:
        kv_blocks_used: Blocks in use (neither free nor merely cached).
        step_s: Mean duration of the steps since the last report in seconds; 0.0 when there was none.
        steps: Those steps with their batches, as timed by the engine; empty when it does not time them.
        foreign_running_tokens: Lengths of running requests of other front-end processes: load here, but not ours to
            move.
        foreign_waiting_tokens: Lengths of their waiting requests.
        intervals: How many usual intervals this report stands for: more than one where an idle instance reports rarely.
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
    intervals: int = 1

    @property
    def n_running(self) -> int:
        """Running requests of all front-end processes."""
        return len(self.running_ids) + len(self.foreign_running_tokens)

    @property
    def n_waiting(self) -> int:
        """Waiting requests of all front-end processes."""
        return len(self.waiting_ids) + len(self.foreign_waiting_tokens)


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """
    A new request waits for its `Dispatch` (or `Reject`).

    Attributes:
        max_output_tokens: The request's own cap; a policy must not take it for a forecast.
        prefix_hashes: Hashes of the prompt's leading blocks, each covering all before it; empty when unknown.
        pin_reason: Why this request may never migrate, or None.
        priority: As in vLLM: lower runs earlier.
    """

    cause: str
    request_id: RequestId
    prompt_tokens: int
    max_output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    pin_reason: PinReason | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class FirstToken:
    """
    A request that was dispatched to be parked has its first token and is parked there (`core/parking.py`).

    It decodes no further until a `StartMigration` takes it to another instance.
    """

    cause: str
    request_id: RequestId
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request ended: it finished, failed or was aborted by its client. Its id is free again."""

    cause: str
    request_id: RequestId
    output_tokens: int


@dataclass(frozen=True, slots=True)
class InstanceReported:
    """An instance reported its load. Shells report every 50 to 250 ms, not every step; idle instances report less."""

    cause: str
    instance_id: InstanceId
    report: InstanceReport


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """
    An instance is ready to take requests (first start, restart or scale-out).

    Attributes:
        replaces: The instance whose place among the stages it takes over, in a rolling update.
        node: Where it runs; empty where that is not known.
    """

    cause: str
    instance_id: InstanceId
    kind: InstanceKind
    replaces: InstanceId | None = None
    node: NodeId = ""


@dataclass(frozen=True, slots=True)
class InstanceChanged:
    """An instance has another role or token budget than before; what is there goes on."""

    cause: str
    instance_id: InstanceId
    kind: InstanceKind


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """An instance takes no new requests; its requests move away or finish. `InstanceLost` follows when it is gone."""

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
    An instance's report is overdue: it hangs or is very slow. It gets nothing new while another instance can take it.

    Each id in `withdrawn_ids` needs a new `Dispatch`: the request waited there without a token and has been withdrawn.
    The event may repeat with other ids.
    """

    cause: str
    instance_id: InstanceId
    withdrawn_ids: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceTrusted:
    """A suspected instance answers in time again."""

    cause: str
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """
    A migration that `StartMigration` asked for is over. Exactly one follows each `StartMigration`.

    Attributes:
        outcome: Says where the request is now: the target for MOVED and RECOMPUTED, else the source or nowhere.
        detail: A short reason such as `room_refused:no_blocks` (rule: `core/migration/`). A metric label, so from a
            small set.
        pulled_tokens: Tokens whose KV cache was pulled, before the cut or after it, where that is known.
        pull_s: Seconds that the copy before the cut took, if there was one; else from the cut to the first token at the
            target, where that is known.
        copied_tokens: Tokens whose KV cache was copied before the cut.
    """

    cause: str
    migration_id: MigrationId
    request_id: RequestId
    source_id: InstanceId
    target_id: InstanceId
    outcome: MigrationOutcome
    detail: str = ""
    pulled_tokens: int = 0
    pull_s: float = 0.0
    copied_tokens: int = 0


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A message of the bid-ask protocol reached its recipient's agent; it may be late, and others may be lost."""

    cause: str
    sender_id: InstanceId
    recipient_id: InstanceId
    message: BalanceMessage


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time requested by `Policy.next_timer_s` has come."""

    cause: str


@dataclass(frozen=True, slots=True)
class LayoutAnnounced:
    """
    The front-end process that plans for all has put these stages in force; policies with stages adopt them.

    Attributes:
        layout: The stages in which requests decode.
        prefill: The prefill stages, by prompt length.
    """

    cause: str
    layout: StageLayout
    prefill: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class SeenEnd:
    """A finished request of another process: its lengths in tokens and its arrival time."""

    prompt_tokens: int
    output_tokens: int
    arrived_s: float


@dataclass(frozen=True, slots=True)
class SeenLive:
    """A running or waiting request of another process: arrival, lengths in tokens so far, its own cap on the output."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int


@dataclass(frozen=True, slots=True)
class WorkloadSeen:
    """
    What another front-end process has seen since its last such event, for the one that plans for all. Times are on this
    policy's clock.

    Attributes:
        source: The process.
        n_arrived: Requests that arrived there.
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
    | FirstToken
    | RequestFinished
    | InstanceReported
    | InstanceJoined
    | InstanceChanged
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
