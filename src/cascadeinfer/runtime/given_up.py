"""
Requests that an instance has given up, normally because it is about to die; they then continue elsewhere like any
orphan.

If the instance survives after all, their clients are told of the abort.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from cascadeinfer.engines.patience import Alarm
from cascadeinfer.runtime.streams import Stream

GRACE_S: Final = 10.0
"""How long a request that its instance gave up waits for the instance's death."""


class GivenUp:
    """See the module header."""

    def __init__(self, tell_client: Callable[[Stream, Any], None]) -> None:
        """
        Args:
            tell_client: Called for a request whose instance has not died, with the output that reports the abort.
        """
        self._tell_client = tell_client
        self._alarms: list[Alarm] = []

    def wait(self, stream: Stream, outputs: Any, delta: Any) -> None:
        """An instance gave a request up with this output of this step."""
        attempt = stream.engine_request_id

        def time_is_up() -> None:
            if stream.engine_request_id == attempt:
                delta.request_id = stream.request.request_id
                self._tell_client(stream, type(outputs)(outputs=[delta]))

        now_s = asyncio.get_running_loop().time()
        self._alarms = [alarm for alarm in self._alarms if alarm.when() > now_s]
        self._alarms.append(Alarm(GRACE_S, time_is_up))

    def stop(self) -> None:
        """Stop; no further clients are told."""
        for alarm in self._alarms:
            alarm.cancel()
