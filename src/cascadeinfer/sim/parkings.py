"""Follows requests that are parked after their first token, by the table in `core/parking.py`."""

from collections.abc import Callable

from cascadeinfer.core.parking import Parking, ParkingAction, ParkingEvent, ParkingLimits, ParkingState
from cascadeinfer.core.types import RequestId
from cascadeinfer.sim.kernel import Kernel, Priority
from cascadeinfer.sim.requests import Phase, SimRequest


class Parkings:
    """All requests that were dispatched to be parked and have not left."""

    def __init__(
        self,
        kernel: Kernel,
        limits: ParkingLimits,
        tell: Callable[[SimRequest], None],
        take_back: Callable[[SimRequest], None],
    ) -> None:
        """
        Args:
            kernel: The clock.
            limits: How long a request may be parked.
            tell: Tells the policy that a request is parked.
            take_back: Frees a parked request's pinned blocks, and queues it where it is.
        """
        self._kernel = kernel
        self._limits = limits
        self._tell = tell
        self._take_back = take_back
        self._parkings: dict[RequestId, Parking] = {}

    def begin(self, request: SimRequest) -> None:
        """A request has been dispatched with its cut armed."""
        self._parkings[request.request_id] = Parking(request.request_id)

    def first_token(self, request: SimRequest) -> None:
        """It has its first token and is parked now."""
        parking = self._parkings[request.request_id]
        parking.parked_s = self._kernel.now_s
        self._wait(parking, request)
        self._happen(request, ParkingEvent.FIRST_TOKEN)

    def move_began(self, request: SimRequest) -> float | None:
        """A migration of any request begins. Returns since when it has been parked; None if it is not parked."""
        parking = self._parkings.get(request.request_id)
        if parking is None or parking.state is not ParkingState.PARKED:
            return None
        self._happen(request, ParkingEvent.MOVE_BEGAN)
        return parking.parked_s

    def move_ended(self, request: SimRequest) -> None:
        """The migration of any request is over."""
        parking = self._parkings.get(request.request_id)
        if parking is not None and parking.state is ParkingState.LEAVING:
            stays = request.phase is Phase.PARKED
            self._happen(request, ParkingEvent.MOVE_REFUSED if stays else ParkingEvent.MOVE_OVER)

    def left(self, request: SimRequest) -> None:
        """Any request has ended, or is on no instance now."""
        if request.request_id in self._parkings:
            self._happen(request, ParkingEvent.LEFT)

    def _happen(self, request: SimRequest, event: ParkingEvent) -> None:
        parking = self._parkings[request.request_id]
        actions = parking.handle(event)
        if parking.state is ParkingState.OVER:
            del self._parkings[request.request_id]
        if ParkingAction.TELL in actions:
            self._tell(request)
        if ParkingAction.TAKE_BACK in actions:
            self._take_back(request)

    def _wait(self, parking: Parking, request: SimRequest) -> None:
        at_s = self._kernel.now_s + self._limits.park_s
        self._kernel.at(at_s, Priority.CONTROL, self._timed_out, (parking, request))

    def _timed_out(self, what: tuple[Parking, SimRequest]) -> None:
        parking, request = what
        if parking.state in {ParkingState.PARKED, ParkingState.LEAVING}:
            if parking.state is ParkingState.LEAVING:
                self._wait(parking, request)
            self._happen(request, ParkingEvent.TIMED_OUT)
