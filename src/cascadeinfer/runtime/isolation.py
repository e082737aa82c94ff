"""
Isolates requests under which instances have died (`core/quarantine.py`), and ends those that caused the deaths.

A suspected request is held back until the instance where it is placed answers a load query sent after the last death,
because several instances may have died together.

Isolation is per front-end process: each has its own requests, so suspected requests of two processes can meet on one
instance. If it dies, both processes end theirs.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from cascadeinfer.core.quarantine import Quarantine
from cascadeinfer.core.types import InstanceId
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.streams import Stream, StreamTable

logger = logging.getLogger(__name__)

POISON_REMEMBERED: Final = 32
POISON_SENTENCE: Final = "poison_request: the instances that ran this request died under it; it is not tried again"
"""The message to its client, with HTTP 500."""


class Isolation:
    """
    See the module header.

    Attributes:
        send: Sends a request that was held back to the instance where it is placed.
    """

    def __init__(self, streams: StreamTable, metrics: RuntimeMetrics, clock: Callable[[], float], deaths: int) -> None:
        """
        Args:
            deaths: Number of instance deaths after which a request is ended.
            streams: The live requests; the table reports here when one leaves its place.
            metrics: Counts poison requests.
            clock: The time in seconds.
        """
        self._streams = streams
        self._metrics = metrics
        self._clock = clock
        self._quarantine = Quarantine(deaths)
        self._died_s = -math.inf
        self._poison: deque[dict[str, Any]] = deque(maxlen=POISON_REMEMBERED)
        self.send: Callable[[Stream], None] = lambda _: None
        streams.on_displaced.append(self._displaced)
        streams.on_closed = self._closed

    def may_enter(self, stream: Stream) -> bool:
        """Whether a newly placed request may be sent now; if not, it is sent later."""
        assert stream.instance_id is not None
        may = self._quarantine.may_enter(stream.request.request_id, stream.instance_id)
        self._count()
        return may

    def keeps(self, stream: Stream) -> bool:
        """Whether a request must stay where it is."""
        return self._quarantine.is_suspected(stream.request.request_id)

    def token_came(self, stream: Stream) -> None:
        """The current attempt of a request has produced a token."""
        if not self._quarantine.is_idle:
            n_tokens = len(stream.output_token_ids) - stream.tokens_before
            was_suspected = self.keeps(stream)
            self._send(self._quarantine.prove(stream.request.request_id, n_tokens))
            if was_suspected:  # every token passes here
                self._count()

    def instance_answered(self, instance_id: InstanceId, asked_s: float | None) -> None:
        """An instance has answered the query sent at this time, on the loop's clock; None: it reported unasked."""
        if asked_s is not None and asked_s > self._died_s:
            self._send(self._quarantine.answer(instance_id))

    def taken_away(self, stream: Stream, instance_id: InstanceId) -> None:
        """A request is about to be withdrawn from a silent instance."""
        self._quarantine.take_away(stream.request.request_id, instance_id)

    def may_be_taken(self, stream: Stream) -> bool:
        """Whether a request may be withdrawn from a silent instance: not if it may be the cause."""
        return self._quarantine.may_be_taken(stream.request.request_id)

    def instance_trusted(self, instance_id: InstanceId) -> None:
        """It answers again, or was stopped on purpose: no request is to blame."""
        self._quarantine.trust(instance_id)

    def instance_died(self, instance_id: InstanceId) -> Stream | None:
        """
        An instance died; call this before its requests are displaced.

        Returns:
            The request that caused it, if known by now. It may run elsewhere after being withdrawn from there.
        """
        self._died_s = asyncio.get_running_loop().time()
        there = {stream.request.request_id: stream.started for stream in self._streams.on_instance(instance_id)}
        culprit = self._quarantine.die(instance_id, there, {name for name, started in there.items() if not started})
        self._count()
        if culprit is None:
            return None
        stream = self._streams.get(culprit)
        assert stream is not None
        deaths = self._quarantine.suspicions[culprit].deaths
        self._poison.append({"id": culprit, "deaths": deaths, "tokens": stream.n_tokens, "at_s": self._clock()})
        self._metrics.poison_requests.inc()
        logger.error("request %s ends: %d instances died under it, the last one is %s", culprit, deaths, instance_id)
        return stream

    def shown(self, now_s: float) -> dict[str, Any]:
        """For `/admin/instances`."""
        return {
            "suspected": [
                {
                    "id": request_id,
                    "deaths": suspicion.deaths,
                    "instance": stream.instance_id,
                    "held": self._quarantine.is_held(request_id),
                }
                for request_id, suspicion in self._quarantine.suspicions.items()
                if suspicion.is_open and (stream := self._streams.get(request_id)) is not None
            ],
            "poison": [
                {
                    **{name: value for name, value in ended.items() if name != "at_s"},
                    "seconds_ago": round(now_s - ended["at_s"], 1),
                }
                for ended in self._poison
            ],
        }

    def _displaced(self, stream: Stream) -> None:
        if not self._quarantine.is_idle:
            self._send(self._quarantine.leave(stream.request.request_id))

    def _closed(self, stream: Stream) -> None:
        if not self._quarantine.is_idle:
            self._quarantine.forget(stream.request.request_id)
            self._count()

    def _send(self, request_id: str | None) -> None:
        stream = None if request_id is None else self._streams.get(request_id)
        if stream is not None:
            self.send(stream)

    def _count(self) -> None:
        self._metrics.suspected_requests.set(sum(s.is_open for s in self._quarantine.suspicions.values()))
