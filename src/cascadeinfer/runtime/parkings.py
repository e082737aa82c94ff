"""
Follows requests that are parked after their first token, by the table in `core/parking.py`.

A parked request counts where it is parked, like a running one: if the instance dies, it is an orphan. Its attempt has
ended there, so nothing more comes of it, and what is left to do is to move it, to take it back, or to free its blocks.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import Event, FirstToken
from cascadeinfer.core.parking import Parking, ParkingAction, ParkingEvent, ParkingLimits, ParkingState
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.engines.protocol import KvTicket, Resume
from cascadeinfer.runtime.commands import Commands
from cascadeinfer.runtime.migrate import EngineDirectory
from cascadeinfer.runtime.streams import Stream, StreamTable

HAS_TOKEN: Final = frozenset({ParkingState.PARKED, ParkingState.LEAVING})


@dataclass(slots=True)
class ParkedRequest:
    """
    A request that was dispatched to be parked.

    Attributes:
        attempt: Its attempt's id there.
        ticket: Where its KV cache is pinned, once it is parked.
        timer: Ends the time for which it may be parked.
    """

    parking: Parking
    stream: Stream
    instance_id: InstanceId
    attempt: str
    ticket: KvTicket | None = None
    timer: asyncio.TimerHandle | None = None


class Parkings:
    """
    All requests that were dispatched to be parked and have not left.

    Attributes:
        n_parked: Those of them that have their first token.
    """

    def __init__(
        self,
        engines: EngineDirectory,
        streams: StreamTable,
        limits: ParkingLimits,
        emit: Callable[[Event], None],
        add_failed: Callable[[Stream, str], None],
    ) -> None:
        """
        Args:
            engines: Where to find the instances.
            streams: The live requests.
            limits: How long a request may be parked.
            emit: Hands the policy an event.
            add_failed: Called with a request, and the id of its attempt, that could not be sent to an engine.
        """
        self._engines = engines
        self._streams = streams
        self._limits = limits
        self._emit = emit
        self._add_failed = add_failed
        self._parked: dict[RequestId, ParkedRequest] = {}
        self.n_parked = 0
        streams.on_displaced.append(self._displaced)
        self._commands = Commands("a command for a parked request")

    def begin(self, stream: Stream) -> None:
        """A request has been placed on an instance, to be sent there with its cut armed."""
        assert stream.instance_id is not None
        assert stream.engine_request_id is not None
        stream.parks = True
        request_id = stream.request.request_id
        self._parked[request_id] = ParkedRequest(
            Parking(request_id), stream, stream.instance_id, stream.engine_request_id
        )

    def first_token(self, stream: Stream, ticket: KvTicket | None) -> None:
        """
        It has its first token.

        Args:
            stream: Any request.
            ticket: Where its KV cache is pinned, with which it is parked; None: it decodes on.
        """
        if not stream.parks:
            return
        stream.parks = False
        parked = self._parked[stream.request.request_id]
        parked.ticket = ticket
        if ticket is None:
            self._happen(parked, ParkingEvent.NOT_PARKED)
            return
        self._wait(parked)
        self._happen(parked, ParkingEvent.FIRST_TOKEN)

    def move_began(self, stream: Stream) -> KvTicket | None:
        """A migration of any request begins; where its KV cache is pinned, or None if it is not parked."""
        parked = self._parked.get(stream.request.request_id)
        if parked is None or parked.parking.state is not ParkingState.PARKED:
            return None
        self._happen(parked, ParkingEvent.MOVE_BEGAN, renews=False)  # the migration does, before anything else
        return parked.ticket

    def move_ended(self, stream: Stream) -> None:
        """The migration of any request is over: one that has not left its place stays parked."""
        parked = self._parked.get(stream.request.request_id)
        if parked is not None and parked.parking.state is ParkingState.LEAVING:
            self._happen(parked, ParkingEvent.MOVE_REFUSED)

    async def stop(self) -> None:
        """Forget all; for shutdown, after the last request."""
        for parked in self._parked.values():
            if parked.timer is not None:
                parked.timer.cancel()
        self._parked.clear()
        self.n_parked = 0
        await self._commands.stop()

    def _displaced(self, stream: Stream) -> None:
        """Any request leaves its place: it moves, has ended, was withdrawn, or its instance has died."""
        parked = self._parked.get(stream.request.request_id)
        if parked is not None:
            stream.parks = False
            leaves = parked.parking.state is ParkingState.LEAVING
            self._happen(parked, ParkingEvent.MOVE_OVER if leaves else ParkingEvent.LEFT)

    def _happen(self, parked: ParkedRequest, event: ParkingEvent, *, renews: bool = True) -> None:
        was_there = parked.parking.state in HAS_TOKEN
        actions = parked.parking.handle(event)
        self.n_parked += (parked.parking.state in HAS_TOKEN) - was_there
        if parked.parking.state is ParkingState.OVER:
            del self._parked[parked.stream.request.request_id]
            if parked.timer is not None:
                parked.timer.cancel()
        for action in actions:
            if action is not ParkingAction.RENEW_LEASE or renews:
                self._act(parked, action)

    def _act(self, parked: ParkedRequest, action: ParkingAction) -> None:
        request_id = parked.stream.request.request_id
        match action:
            case ParkingAction.TELL:
                self._emit(FirstToken(request_id, request_id, parked.instance_id))
            case ParkingAction.TAKE_BACK:
                self._take_back(parked)
            case ParkingAction.RELEASE_PIN | ParkingAction.RENEW_LEASE:
                self._commands.send(self._command(parked, action))

    async def _command(self, parked: ParkedRequest, action: ParkingAction) -> None:
        """A dying engine answers nothing; its loss arrives as a separate event."""
        engine = self._engines.engine(parked.instance_id)
        if engine is None:
            return
        with contextlib.suppress(EngineError):
            if action is ParkingAction.RELEASE_PIN:
                await engine.release_pin(parked.attempt)
            else:
                await engine.renew_pin(parked.attempt)  # if the lease was over, the next migration finds that out

    def _take_back(self, parked: ParkedRequest) -> None:
        """Nobody has taken it: let it decode where it is."""
        stream = parked.stream
        attempt = self._streams.place(stream, parked.instance_id, "taken back")
        engine = self._engines.engine(parked.instance_id)
        if engine is not None:  # else its loss arrives as a separate event
            resume = Resume(list(stream.output_token_ids))
            self._commands.send(engine.add(attempt, stream.request, resume), partial(self._add_failed, stream, attempt))

    def _wait(self, parked: ParkedRequest) -> None:
        parked.timer = asyncio.get_running_loop().call_later(self._limits.park_s, self._timed_out, parked)

    def _timed_out(self, parked: ParkedRequest) -> None:
        if parked.parking.state is ParkingState.LEAVING:
            self._wait(parked)
        self._happen(parked, ParkingEvent.TIMED_OUT)
