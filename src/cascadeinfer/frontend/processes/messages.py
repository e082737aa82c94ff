"""
What process 0 and a follower tell each other.

News are whole states, not changes: the last one counts, a lost or merged one does no harm. Times are on the monotonic
clock, which all processes of a machine share.
"""

from typing import Any, TypeAlias

import msgspec

from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.attachment import Attachment


class InstanceNews(msgspec.Struct, frozen=True):
    """
    One instance.

    Attributes:
        attachment: What this follower needs to use it; None while it is not up.
        restarts: Times it was restarted.
        drain_ends_s: When the time is up that it has to hand its requests over; None when it does not drain.
        condemned: Why it is restarted although no request has done anything to it; None if it is not.
    """

    instance_id: InstanceId
    attachment: Attachment | None
    restarts: int
    drain_ends_s: float | None
    condemned: str | None = None


class FleetNews(msgspec.Struct, frozen=True, tag=True):
    """All instances that there are, once those of the start are up, and the pairs of them that are not connected."""

    instances: list[InstanceNews]
    broken_pairs: tuple[tuple[InstanceId, ...], ...] = ()


class LayoutNews(msgspec.Struct, frozen=True, tag=True):
    """The stages that process 0 has put in force."""

    boundaries_tokens: list[int]
    groups: list[list[InstanceId]]

    @classmethod
    def of(cls, layout: StageLayout) -> "LayoutNews":
        """The message for a layout."""
        return cls(list(layout.boundaries_tokens), [list(stage.instance_ids) for stage in layout.stages])

    def layout(self) -> StageLayout:
        """The layout."""
        return StageLayout.from_boundaries(tuple(self.boundaries_tokens), tuple(map(tuple, self.groups)))


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Drain and end; or end at once."""

    at_once: bool


class Look(msgspec.Struct, frozen=True, tag=True):
    """
    A follower asks for all that `/admin/instances` shows.

    Attributes:
        number: Of the question; its answer has the same.
    """

    number: int


class AddInstances(msgspec.Struct, frozen=True, tag=True):
    """A follower asks for so many instances more."""

    number: int
    count: int


class DrainInstance(msgspec.Struct, frozen=True, tag=True):
    """A follower asks that an instance be drained."""

    number: int
    instance_id: InstanceId
    timeout_s: float


class Shown(msgspec.Struct, frozen=True, tag=True):
    """To `Look`: JSON, made to be shown and not to be understood here."""

    number: int
    content: dict[str, Any]


class Added(msgspec.Struct, frozen=True, tag=True):
    """To `AddInstances`: those that start now."""

    number: int
    instance_ids: list[InstanceId]


class Drains(msgspec.Struct, frozen=True, tag=True):
    """To `DrainInstance`: it is under way."""

    number: int
    instance_id: InstanceId


class UnknownInstance(msgspec.Struct, frozen=True, tag=True):
    """To `DrainInstance`: there is no such instance."""

    number: int
    instance_id: InstanceId


class Refused(msgspec.Struct, frozen=True, tag=True):
    """To `AddInstances` or `DrainInstance`: why not."""

    number: int
    reason: str


class Summary(msgspec.Struct, frozen=True, tag=True):
    """
    What a follower has now, and what it has seen since its last summary.

    Attributes:
        live: Requests that have not ended, of which `unplaced` are on no instance and the others `on_instance`.
        migrations_ended: By outcome, since the process began.
        n_arrived: Requests that came.
        ended: The fields of a SeenEnd of each that ended.
        unfinished: The fields of a SeenLive of each that runs or waits now.
        event_log_failure: Why it writes no event log, though there should be one.
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


Question: TypeAlias = Look | AddInstances | DrainInstance
"""What only process 0 knows or does."""
Answer: TypeAlias = Shown | Added | Drains | UnknownInstance | Refused
FromOwner: TypeAlias = FleetNews | LayoutNews | Stop | Answer
FromFollower: TypeAlias = Question | Summary
