"""
Requests that an instance has given up, normally because it is about to die; they then continue elsewhere like any
orphan.

If the instance survives after all, or says that it was told to pause, their clients are told of the abort.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.patience import Alarm
from cascadeinfer.runtime.streams import Stream

GRACE_S: Final = 10.0
"""How long a request that its instance gave up waits for the instance's death."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that waits for its instance's death."""

    stream: Stream
    attempt: str
    alarm: Alarm
    tell: Callable[[], None]

    @property
    def is_current(self) -> bool:
        """Whether nobody has taken the request up since."""
        return self.stream.engine_request_id == self.attempt


class GivenUp:
    """See the module header."""

    def __init__(self, tell_client: Callable[[Stream, Any], None]) -> None:
        """
        Args:
            tell_client: Called for a request whose instance has not died, with the output that reports the abort.
        """
        self._tell_client = tell_client
        #: By the id of the attempt; the others have continued elsewhere, or their clients have been told.
        self._waiting: dict[str, _Waiting] = {}

    def wait(self, stream: Stream, outputs: Any, delta: Any) -> None:
        """An instance gave a request up with this output of this step."""
        attempt = stream.engine_request_id
        assert attempt is not None, "its output was taken for the request's"

        def tell() -> None:
            waiting = self._waiting.pop(attempt)
            waiting.alarm.cancel()
            if stream.engine_request_id == attempt:
                delta.request_id = stream.request.request_id
                self._tell_client(stream, type(outputs)(outputs=[delta]))

        self._forget_others()
        if attempt in self._waiting:
            return  # said twice
        self._waiting[attempt] = _Waiting(stream, attempt, Alarm(GRACE_S, tell), tell)

    def paused(self, instance_id: InstanceId) -> None:
        """An instance says that it is paused: what it gave up, it was told to abort."""
        for waiting in [w for w in self._waiting.values() if w.stream.instance_id == instance_id and w.is_current]:
            waiting.tell()

    def stop(self) -> None:
        """Stop; no further clients are told."""
        for waiting in self._waiting.values():
            waiting.alarm.cancel()
        self._waiting.clear()

    def _forget_others(self) -> None:
        """Requests that have meanwhile continued elsewhere, or ended."""
        for waiting in [w for w in self._waiting.values() if not w.is_current]:
            waiting.alarm.cancel()
            del self._waiting[waiting.attempt]
