"""
The live requests of the runtime: each runs on exactly one instance at a time, and each token is delivered exactly once.

Every placement of a request on an engine is an *attempt* with its own engine-side id (`id`, then `id~1`, `id~2` ...).
Only the current attempt is in the table, so late output of a superseded attempt (a token in flight at an abort, a
finish from a killed engine) matches no stream and is dropped. The output so far is kept here, because a request needs
it to continue elsewhere.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import PolicyError, RequestIdInUseError, RequestRejectedError
from cascadeinfer.core.events import Event, InstanceReport
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.migration import Migration
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.engines.protocol import EngineRequest


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    Why the policy did not take a request that was announced to it.

    Attributes:
        outcome: The metric label of its end: `rejected`, or `failed` where the policy failed at it.
        error: Raised to the sender.
    """

    outcome: str
    error: RequestRejectedError | PolicyError


class Step(NamedTuple):
    """A step of a request's story: what happened, at which length of the request, under which stages."""

    at_s: float
    what: Event | Effect
    n_tokens: int
    layout: StageLayout | None


@dataclass(slots=True)
class Visit:
    """
    A request's stay on one instance: one attempt.

    Attributes:
        how: `dispatched`, `dispatched again`, `moved`, `recomputed` or `taken back`.
        reason: Why it moved, as in the metric of migrations; empty if it was dispatched.
        began_s: When, in seconds since 1970.
        ended_s: When it left or ended; None while it is there.
    """

    instance_id: InstanceId
    how: str
    reason: str
    began_s: float
    ended_s: float | None = None


@dataclass(slots=True)
class Journey:
    """Where a request has been, in order; kept by whoever wants to know after its end."""

    request_id: RequestId
    visits: list[Visit] = field(default_factory=list)

    @property
    def moves(self) -> int:
        """How often it went from one instance to another."""
        return sum(a.instance_id != b.instance_id for a, b in itertools.pairwise(self.visits))


@dataclass(slots=True)
class Stream:
    """
    One live request.

    Attributes:
        arrived_s: When it came, on the runtime's clock.
        output_token_ids: Everything delivered so far.
        instance_id: Where its current attempt runs; None while it waits for a dispatch.
        engine_request_id: The current attempt's id there; None likewise.
        attempts: Attempts so far.
        migration: The migration it takes part in, or None.
        tokens_before: Output tokens when its current attempt began.
        model_version: The version of the model that has written its output before its current attempt; None: it had
            none.
        withdrawals: How often it was taken away from an instance that did not answer.
        arriving: Whether its sender waits to hear whether the policy takes it.
        refusal: Why the policy did not take it, until whoever announced it has ended it; None: it took it, or has not
            heard of it.
        parks: Its current attempt is to end with its first token, which has not come yet (`runtime/parkings.py`).
        ending: Its end is under way: the policy, which hears of that piece by piece, can do nothing more with it.
        first_token_s: When its first token came, on the runtime's clock; None before that.
        last_token_s: The same of its last token.
        journey: Where it has been.
        steps: Its story so far (`runtime/stories.py`).
        n_dropped_steps: Steps left out of it, after the first.
    """

    request: EngineRequest
    arrived_s: float
    output_token_ids: list[int] = field(default_factory=list)
    instance_id: InstanceId | None = None
    engine_request_id: str | None = None
    attempts: int = 0
    migration: Migration | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    tokens_before: int = 0
    model_version: str | None = None
    withdrawals: int = 0
    arriving: bool = False
    refusal: Refusal | None = None
    parks: bool = False
    ending: bool = False
    steps: list[Step] = field(default_factory=list)
    n_dropped_steps: int = 0
    journey: Journey = field(init=False)

    def __post_init__(self) -> None:
        """It has been nowhere."""
        self.journey = Journey(self.request.request_id)

    @property
    def started(self) -> bool:
        """Whether its current attempt has produced a token."""
        return len(self.output_token_ids) > self.tokens_before

    @property
    def n_tokens(self) -> int:
        """Sequence length: prompt and output so far."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def token_s(self) -> float:
        """Mean time between its tokens so far, in seconds; 0.0 before the second."""
        if self.first_token_s is None or self.last_token_s is None or len(self.output_token_ids) < 2:
            return 0.0
        return (self.last_token_s - self.first_token_s) / (len(self.output_token_ids) - 1)


@dataclass(slots=True)
class Seen:
    """
    Arrivals and ends since the last `take`: what one process reports to the one that plans for all.

    Attributes:
        n_arrived: Requests that arrived.
        ended: The fields of a SeenEnd for each that ended; None if nobody asks for them.
    """

    n_arrived: int = 0
    ended: list[tuple[int, int, float]] | None = None

    def note_end(self, prompt_tokens: int, output_tokens: int, arrived_s: float) -> None:
        """A request ended."""
        if self.ended is not None:
            self.ended.append((prompt_tokens, output_tokens, arrived_s))

    def take(self) -> tuple[int, list[tuple[int, int, float]]]:
        """Arrivals and ends since the last call; ends are recorded from the first call on."""
        taken = self.n_arrived, self.ended or []
        self.n_arrived, self.ended = 0, []
        return taken


class StreamTable:
    """All live requests, by their own id and by their current attempt's."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        """
        Start empty.

        Args:
            wall_clock: Seconds since 1970, for what others read of journeys.
        """
        self._wall_clock = wall_clock
        self._streams: dict[RequestId, Stream] = {}
        self._by_attempt: dict[str, Stream] = {}
        #: The version of the model that an instance runs.
        self.version_of: Callable[[InstanceId], str] = lambda _: ""
        #: Called with the instance of each placement.
        self.on_placed: Callable[[InstanceId], None] = lambda _: None
        #: Called for each request that leaves its place; `on_closed` for each that ends.
        self.on_displaced: list[Callable[[Stream], None]] = []
        self.on_closed: Callable[[Stream], None] = lambda _: None
        #: The request whose current attempt has this id; None for output of an old attempt.
        self.of_attempt: Callable[[str], Stream | None] = self._by_attempt.get

    def __len__(self) -> int:
        """Live requests."""
        return len(self._streams)

    @property
    def n_unplaced(self) -> int:
        """Live requests that are on no instance."""
        return len(self._streams) - len(self._by_attempt)

    def __iter__(self) -> Iterator[Stream]:
        """Live requests in order of arrival; safe against concurrent changes."""
        return iter(list(self._streams.values()))

    def get(self, request_id: RequestId) -> Stream | None:
        """The live request with this id; None for one that is ending."""
        stream = self._streams.get(request_id)
        return None if stream is None or stream.ending else stream

    def on_instance(self, instance_id: InstanceId) -> list[Stream]:
        """Requests whose current attempt runs there."""
        return [stream for stream in self._streams.values() if stream.instance_id == instance_id]

    def known(self, report: InstanceReport) -> InstanceReport:
        """An engine's report with those of its requests whose current attempt it runs, by their own ids."""
        running = self._known(report.running_ids, report.running_tokens)
        waiting = self._known(report.waiting_ids, report.waiting_tokens)
        return dataclasses.replace(
            report,
            running_ids=tuple(running),
            running_tokens=tuple(running.values()),
            waiting_ids=tuple(waiting),
            waiting_tokens=tuple(waiting.values()),
        )

    def _known(self, engine_request_ids: tuple[str, ...], tokens: tuple[int, ...]) -> dict[RequestId, int]:
        streams = zip(map(self.of_attempt, engine_request_ids), tokens, strict=True)
        return {stream.request.request_id: n for stream, n in streams if stream is not None}

    def open(self, request: EngineRequest, now_s: float) -> Stream:
        """A new request arrives; raises RequestIdInUseError when its id is live."""
        if request.request_id in self._streams:
            raise RequestIdInUseError(request.request_id)
        stream = Stream(request, now_s)
        self._streams[request.request_id] = stream
        return stream

    def place(self, stream: Stream, instance_id: InstanceId, how: str = "dispatched", reason: str = "") -> str:
        """Begin a new attempt on this instance, ending the previous one; returns its id. See Visit for the words."""
        self.displace(stream)
        self.on_placed(instance_id)
        stream.journey.visits.append(Visit(instance_id, how, reason, self._wall_clock()))
        request_id = stream.request.request_id
        engine_request_id = request_id if stream.attempts == 0 else f"{request_id}~{stream.attempts}"
        stream.attempts += 1
        stream.tokens_before = len(stream.output_token_ids)
        stream.instance_id = instance_id
        stream.engine_request_id = engine_request_id
        self._by_attempt[engine_request_id] = stream
        return engine_request_id

    def displace(self, stream: Stream) -> None:
        """End the current attempt, if any: its further output is ignored."""
        if stream.engine_request_id is None or stream.instance_id is None:
            return
        if stream.started:
            stream.model_version = self.version_of(stream.instance_id)
        del self._by_attempt[stream.engine_request_id]
        stream.journey.visits[-1].ended_s = self._wall_clock()
        stream.instance_id = None
        stream.engine_request_id = None
        for tell in self.on_displaced:
            tell(stream)

    def close(self, stream: Stream) -> None:
        """The request is over."""
        self.displace(stream)
        del self._streams[stream.request.request_id]
        self.on_closed(stream)
