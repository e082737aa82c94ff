"""
What goes wrong in a run, and when: a plan made beforehand, so that the same seed gives the same run.

Instances crash (and may come back), drain, or join late; clients leave; messages are lost or late. Whether a message is
lost is drawn when it is sent, from the run's own generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascadeinfer.core.types import InstanceId


@dataclass(frozen=True, slots=True)
class Crash:
    """An instance dies at once; with `back_after_s` it joins again, empty, that long after the crash."""

    at_s: float
    instance_id: InstanceId
    back_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """An instance takes no new requests from then on and leaves when it is empty."""

    at_s: float
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class LateJoin:
    """An instance of the cluster is not there from the start but joins now."""

    at_s: float
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The client of the trace's request `row` leaves; nothing happens if the request is over."""

    at_s: float
    row: int


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """
    All faults of a run.

    Attributes:
        message_drop: Probability that a bid-ask message is lost.
        message_jitter_s: Mean of the exponential extra delay of a message.
    """

    crashes: tuple[Crash, ...] = ()
    drains: tuple[Drain, ...] = ()
    late_joins: tuple[LateJoin, ...] = ()
    disconnects: tuple[Disconnect, ...] = ()
    message_drop: float = 0.0
    message_jitter_s: float = 0.0

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        ids: Sequence[InstanceId],
        rows: int,
        duration_s: float,
        *,
        crashes_per_instance: float = 0.5,
        disconnect_share: float = 0.05,
        message_drop: float = 0.05,
        message_jitter_s: float = 0.01,
    ) -> "FaultPlan":
        """
        A random plan for fuzzing; the first instance never crashes, so that work can go on.

        Args:
            rng: Source of randomness.
            ids: The cluster's instances.
            rows: Requests in the trace.
            duration_s: Faults fall into `[0, duration_s)`.
            crashes_per_instance: Mean number per instance; each comes back.
            disconnect_share: Probability that a request's client leaves.
            message_drop: See the attribute.
            message_jitter_s: See the attribute.
        """
        crashes: list[Crash] = []
        for instance_id in ids[1:]:
            at_s = 0.0
            for _ in range(int(rng.poisson(crashes_per_instance))):
                at_s += float(rng.uniform(0.0, duration_s))
                back_after_s = 2.0 + float(rng.uniform(0.0, 0.2 * duration_s))
                if at_s < duration_s:
                    crashes.append(Crash(at_s, instance_id, back_after_s))
                at_s += back_after_s
        leaving = np.flatnonzero(rng.random(rows) < disconnect_share).tolist()
        disconnects = tuple(Disconnect(float(rng.uniform(0.0, duration_s)), row) for row in leaving)
        return cls(
            crashes=tuple(crashes),
            disconnects=disconnects,
            message_drop=message_drop,
            message_jitter_s=message_jitter_s,
        )
