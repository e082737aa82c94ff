"""
Repairs the fate of requests after the policy failed at an event.

The policy's books may then record a request as placed, or an instance as in use, although nothing was done. So that
nothing waits for ever:

- A request at whose arrival the policy fails is refused with an error at once.
- Some time after any failure, every unplaced request is announced anew: its end, then its arrival as a prompt of its
  length so far. It continues where the policy then places it. If the policy fails at it again, or refuses it, it ends
  with an error.
- If the policy failed at an instance's arrival or loss, that is announced anew for as long as it holds.
- The end of a request or migration, or the drain of an instance, is announced a second time, so that the books do not
  count it for ever.

One case remains: a migration recorded by the policy before it raised. It is forgotten when its request ends.
"""

import asyncio
from typing import Final, Protocol

from cascadeinfer.core.errors import PolicyError
from cascadeinfer.core.events import (
    Event,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    MigrationEnded,
    RequestArrived,
    RequestFinished,
)
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.streams import Refusal, Stream, StreamTable

REPAIR_AFTER_S: Final = 1.0
"""Pause between a failure and the repair; it limits how often a policy that always fails is asked."""


class Host(Protocol):
    """The part of the runtime that recovery needs."""

    def emit(self, event: Event) -> None:
        """Hand the policy an event."""
        ...

    def announce_loss(self, instance_id: InstanceId) -> None:
        """Tell the policy that an instance is gone, with what was there."""
        ...

    def end_with_error(self, stream: Stream, outcome: str) -> None:
        """Its client gets an error; `outcome` is a metric label."""
        ...


class Recovery:
    """See the module header."""

    def __init__(self, fleet: Fleet, streams: StreamTable, metrics: RuntimeMetrics, host: Host) -> None:
        """
        Args:
            fleet: The instances.
            streams: The live requests.
            metrics: Where failures are counted.
            host: The runtime.
        """
        self._fleet = fleet
        self._streams = streams
        self._metrics = metrics
        self._host = host
        self._joins: dict[InstanceId, InstanceJoined] = {}
        self._losses: set[InstanceId] = set()
        self._untold: list[Event] = []
        self._repairing = False
        self._timer: asyncio.TimerHandle | None = None

    def policy_failed(self, event: Event) -> None:
        """The policy failed at this event: make sure that the requests continue."""
        self._metrics.policy_failures.labels(type(event).__name__).inc()
        match event:
            case RequestArrived():
                self._refuse(event.request_id)
            case InstanceJoined():
                self._joins[event.instance_id] = event
            case InstanceLost():
                self._losses.add(event.instance_id)
            case RequestFinished() | MigrationEnded() | InstanceDraining() if not self._repairing:
                self._untold.append(event)
            case _:
                pass
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REPAIR_AFTER_S, self._repair)

    def stop(self) -> None:
        """Cancel pending repairs."""
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, request_id: RequestId) -> None:
        """The policy failed at a request announced to it. If it had refused the request before, the refusal stands."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.refusal is None:
            failure = PolicyError(f"the scheduling policy failed at request {request_id}; the log says how")
            stream.refusal = Refusal("failed", failure)

    def _repair(self) -> None:
        self._timer = None
        self._repairing = True
        try:
            self._tell_again()
            self._place_again()
        finally:
            self._repairing = False

    def _tell_again(self) -> None:
        losses, self._losses = self._losses, set()
        joins, self._joins = self._joins, {}
        untold, self._untold = self._untold, []
        for event in untold:
            if not (
                isinstance(event, RequestFinished) and self._streams.get(event.request_id)
            ):  # its id is not in use again
                self._host.emit(event)
        for instance_id in sorted(losses):
            if self._fleet.engine(instance_id) is None:
                self._host.announce_loss(instance_id)
        for instance_id, joined in joins.items():
            if self._fleet.engine(instance_id) is not None:
                self._host.emit(InstanceLost(joined.cause, instance_id))  # whatever the policy has noted of it
                self._host.emit(joined)

    def _place_again(self) -> None:
        for stream in self._streams:
            if stream.instance_id is None and stream.migration is None:
                self._announce_anew(stream)

    def _announce_anew(self, stream: Stream) -> None:
        request = stream.request
        request_id, n_output = request.request_id, len(stream.output_token_ids)
        self._host.emit(RequestFinished(request_id, request_id, n_output))
        self._host.emit(
            RequestArrived(
                request_id,
                request_id,
                stream.n_tokens,
                max(1, request.max_output_tokens - n_output),
                request.prefix_hashes,
                pin_reason=request.pin_reason,
                priority=request.priority,
            )
        )
        if stream.refusal is not None:
            self._host.end_with_error(stream, stream.refusal.outcome)
