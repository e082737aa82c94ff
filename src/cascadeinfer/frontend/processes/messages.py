"""
The messages between process 0 and its followers.

News carries whole states, not changes: the last one counts, and a lost or merged one does no harm. Times are on the
monotonic clock, which all processes of a machine share.
"""

from typing import Any, TypeAlias

import msgspec

from cascadeinfer.core.layout import Stage, StageLayout
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, LengthRange, RequestId
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.attachment import AnyAttachment
from cascadeinfer.runtime.ledger import EndedMove
from cascadeinfer.runtime.picture import Move, OldRequest
from cascadeinfer.runtime.view import InstanceRecord


class InstanceNews(msgspec.Struct, frozen=True):
    """
    The state of one instance.

    Attributes:
        attachment: What this follower needs to use it; None while it is not up.
        restarts: Number of restarts.
        drain_ends_s: When the time for handing its requests over is up; None if it is not draining.
        condemned: Why it is being restarted although no request is to blame; None if it is not.
        build: What it is started with.
        replaces: The instance whose place among the stages it takes over, or None.
        heir_of: The first in the row of those that replaced one another up to it, for a follower that does not know the
            last of them; None if it replaces none.
        role: What it computes; empty while it is not up.
        step_tokens: Its token budget of a step; 0 while it is not up.
    """

    instance_id: InstanceId
    attachment: AnyAttachment | None
    restarts: int
    drain_ends_s: float | None
    condemned: str | None = None
    build: Build = FIRST_BUILD
    replaces: InstanceId | None = None
    heir_of: InstanceId | None = None
    role: str = ""
    step_tokens: int = 0

    @classmethod
    def of(cls, record: InstanceRecord, attachment: AnyAttachment | None) -> "InstanceNews":
        """The news of an instance."""
        supervisor, drain = record.supervisor, record.drain
        kind = None if record.engine is None else record.kind
        return cls(
            record.instance_id,
            attachment,
            supervisor.restarts,
            None if drain is None else drain.ends_s,
            supervisor.condemned,
            record.build,
            record.replaces,
            record.heir_of,
            "" if kind is None else kind.role.value,
            0 if kind is None else kind.capacity.max_batched_tokens,
        )


class FleetNews(msgspec.Struct, frozen=True, tag=True):
    """All instances, once the initial ones are up, and the pairs that are not connected."""

    instances: list[InstanceNews]
    broken_pairs: tuple[tuple[InstanceId, ...], ...] = ()


class LayoutNews(msgspec.Struct, frozen=True, tag=True):
    """The stages that process 0 has put in force."""

    boundaries_tokens: list[int]
    groups: list[list[InstanceId]]
    prefill_from_tokens: list[int] = []
    prefill_groups: list[list[InstanceId]] = []

    @classmethod
    def of(cls, layout: StageLayout, prefill: tuple[Stage, ...]) -> "LayoutNews":
        """The message for the stages that decode, and the prefill stages."""
        return cls(
            list(layout.boundaries_tokens),
            [list(stage.instance_ids) for stage in layout.stages],
            [stage.range.lo_tokens for stage in prefill],
            [list(stage.instance_ids) for stage in prefill],
        )

    def layout(self) -> StageLayout:
        """The layout of the stages that decode."""
        return StageLayout.from_boundaries(tuple(self.boundaries_tokens), tuple(map(tuple, self.groups)))

    def prefill(self) -> tuple[Stage, ...]:
        """The prefill stages, by prompt length."""
        ends = [*self.prefill_from_tokens[1:], UNBOUNDED_TOKENS]
        ranges = map(LengthRange, self.prefill_from_tokens, ends)
        return tuple(Stage(lengths, tuple(ids)) for lengths, ids in zip(ranges, self.prefill_groups, strict=True))


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Drain and exit, or exit at once."""

    at_once: bool


class Look(msgspec.Struct, frozen=True, tag=True):
    """
    A follower asks for everything that `/admin/instances` shows.

    Attributes:
        number: Number of the question; the answer carries it too.
    """

    number: int


class LookAtPicture(msgspec.Struct, frozen=True, tag=True):
    """A follower asks, for a viewer, for the picture of all processes."""

    number: int


class TellStory(msgspec.Struct, frozen=True, tag=True):
    """
    A follower asks process 0 for the story of a request of any other process; process 0 asks a follower for that of one
    of its own.
    """

    number: int
    request_id: RequestId


class AddInstances(msgspec.Struct, frozen=True, tag=True):
    """A follower asks for this many more instances."""

    number: int
    count: int


class DrainInstance(msgspec.Struct, frozen=True, tag=True):
    """A follower asks that an instance be drained."""

    number: int
    instance_id: InstanceId
    timeout_s: float


class LookAtRoll(msgspec.Struct, frozen=True, tag=True):
    """A follower asks how far the rolling update is."""

    number: int


class BeginRoll(msgspec.Struct, frozen=True, tag=True):
    """A follower asks for a rolling update to these engine options, see `Rolling.begin`."""

    number: int
    options: list[str]
    timeout_s: float


class Shown(msgspec.Struct, frozen=True, tag=True):
    """
    Answer to `Look`, `LookAtPicture`, `LookAtRoll`, `BeginRoll` or `TellStory`: JSON to pass on without interpreting
    it; None if there is no such request.
    """

    number: int
    content: dict[str, Any] | None


class Added(msgspec.Struct, frozen=True, tag=True):
    """Answer to `AddInstances`: the instances that are starting."""

    number: int
    instance_ids: list[InstanceId]


class Drains(msgspec.Struct, frozen=True, tag=True):
    """Answer to `DrainInstance`: the drain is under way."""

    number: int
    instance_id: InstanceId


class UnknownInstance(msgspec.Struct, frozen=True, tag=True):
    """Answer to `DrainInstance`: there is no such instance."""

    number: int
    instance_id: InstanceId


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Answer to `AddInstances`, `DrainInstance` or `BeginRoll`: why it was refused."""

    number: int
    reason: str


class WrongOptions(msgspec.Struct, frozen=True, tag=True):
    """Answer to `BeginRoll`: what is wrong with the options."""

    number: int
    reason: str


class Unanswered(msgspec.Struct, frozen=True, tag=True):
    """Answer to `TellStory`: no process that answers has the request, and another does not answer."""

    number: int


class Summary(msgspec.Struct, frozen=True, tag=True):
    """
    What a follower has now, and what it has seen since its last summary.

    Attributes:
        live: Requests that have not ended: `unplaced` ones are on no instance, the others are in `on_instance`.
        migrations_ended: By outcome, since the process began.
        n_arrived: Requests that arrived.
        ended: The fields of a SeenEnd for each request that ended.
        unfinished: The fields of a SeenLive for each request that runs or waits now.
        event_log_failure: Why it writes no event log although one was requested.
        moves: Migrations under way.
        ended_moves: Migrations that ended since the last summary.
        ended_requests: Requests that ended since then, by outcome.
        oldest: Its oldest live requests.
        in_use: Instances to which it may send requests, or where it has some.
    """

    pid: int
    live: int
    unplaced: int
    on_instance: dict[InstanceId, int]
    migrations_under_way: int
    migrations_ended: dict[str, int]
    n_arrived: int
    ended: list[tuple[int, int, float]]
    unfinished: list[tuple[float, int, int, int]]
    event_log_failure: str | None = None
    moves: list[Move] = []
    ended_moves: list[EndedMove] = []
    ended_requests: dict[str, int] = {}
    oldest: list[OldRequest] = []
    in_use: list[InstanceId] = []


OwnersQuestion: TypeAlias = Look | LookAtPicture | LookAtRoll | AddInstances | DrainInstance | BeginRoll
"""Requests that only process 0 can answer or carry out."""
Question: TypeAlias = OwnersQuestion | TellStory
"""Those that a follower asks; the last one it may be asked, too."""
Answer: TypeAlias = Shown | Added | Drains | UnknownInstance | Refused | WrongOptions | Unanswered
FromOwner: TypeAlias = FleetNews | LayoutNews | Stop | TellStory | Answer
FromFollower: TypeAlias = Question | Summary | Shown
