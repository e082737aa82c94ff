"""
A follower's side: follows the news from process 0, reports what this process has, and asks what only process 0 knows.

When process 0 is gone, the channel closes. The follower then exits at once: the instances die with process 0, or are a
fleet's and wait for the next server, which decides anew for all.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, assert_never

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.core.errors import ConfigError, ScalingRefusedError, UnknownInstanceError
from cascadeinfer.core.events import InstanceChanged, LayoutAnnounced
from cascadeinfer.core.kind import InstanceTerms, Role
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.engines.build import Origin
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.frontend.processes.board import Board
from cascadeinfer.frontend.processes.messages import (
    Added,
    AddInstances,
    BeginRoll,
    DrainInstance,
    Drains,
    FleetNews,
    FromOwner,
    InstanceNews,
    LayoutNews,
    Look,
    LookAtPicture,
    LookAtRoll,
    Question,
    Refused,
    Shown,
    Stop,
    Summary,
    TellStory,
    Unanswered,
    UnknownInstance,
    WrongOptions,
)
from cascadeinfer.frontend.processes.questions import Questions
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

SUMMARY_S = 0.25
ANSWER_TIMEOUT_S = 10.0
CHECK_TIMEOUT_S = 300.0
"""For process 0 to check engine options: it makes a configuration, perhaps of a model that it has to find first."""
UNSENT_MAX_BYTES = 1 << 16
"""Summaries are held back while this much is unread by process 0."""


class Follower:
    """See the module header, and `cascadeinfer.frontend.admin.Admin`."""

    def __init__(
        self,
        channel: Channel[FromOwner],
        board: Board,
        make_engine: Callable[[InstanceId], Callable[[int], Engine]],
        on_stop: Callable[[bool], None],
        event_log_failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            channel: To process 0.
            board: Updated with the instances that are up.
            make_engine: Makes what creates the engine of an instance for its n-th attachment.
            on_stop: Called to drain, or (True) to stop at once.
            event_log_failure: Why this process writes no event log although one was requested.
        """
        self._channel = channel
        self._board = board
        self._make_engine = make_engine
        self._on_stop = on_stop
        self._event_log_failure = event_log_failure
        self._runtime: Runtime | None = None
        self._fleet_news: FleetNews | None = None
        self._layout_news: LayoutNews | None = None
        self._heard = asyncio.Event()
        self._questions = Questions()
        self._known: set[InstanceId] = set()

    async def first_up(self) -> dict[InstanceId, Origin]:
        """Wait for the first news; returns the instances to begin with, and where they come from."""
        while not (up := self._to_begin_with()):
            await self._heard.wait()
            self._heard.clear()
        origins = {news.instance_id: self._origin_of(news) for news in up}
        self._known.update(origins)
        return origins

    def _to_begin_with(self) -> list[InstanceNews]:
        """Instances that are up, and stay: one that drains may be gone at any time."""
        known = [] if self._fleet_news is None else self._fleet_news.instances
        return [news for news in known if news.attachment is not None and news.drain_ends_s is None]

    def _origin_of(self, news: InstanceNews) -> Origin:
        """One that took over from an instance that never was here takes over from the first that the stages name."""
        return Origin(news.build, news.replaces if news.replaces in self._known else news.heir_of)

    def run(self, runtime: Runtime) -> None:
        """The runtime of this process has started: follow the news from now on."""
        self._runtime = runtime
        self._follow_fleet()
        self._follow_layout()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start an indispensable task: if it fails, this process exits, and process 0 starts another."""

        def ended(task: "asyncio.Task[None]") -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("internal error: this front end ends", exc_info=error)
                os._exit(1)

        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(ended)
        return task

    async def listen(self) -> None:
        """Follow process 0 until it is gone, then end this process."""
        async for message in self._channel.messages():
            match message:
                case FleetNews():
                    self._fleet_news = message
                    self._board.follow(
                        {n.instance_id: n.attachment for n in message.instances if n.attachment is not None}
                    )
                    self._heard.set()
                    self._follow_fleet()
                case LayoutNews():
                    self._layout_news = message
                    self._follow_layout()
                case Stop():
                    self._on_stop(message.at_once)
                case TellStory(number, request_id):
                    self._channel.send(Shown(number, self._own_story(request_id)))
                case Shown() | Added() | Drains() | UnknownInstance() | Refused() | WrongOptions() | Unanswered():
                    self._questions.answered(message)
                case _:
                    assert_never(message)
        logger.error("process 0 is gone: this front end ends")
        os._exit(1)

    async def tell(self) -> None:
        """Report periodically to process 0 what this process has."""
        while True:
            self._follow_fleet()  # what could not be done at once
            if self._runtime is not None and self._channel.unsent_bytes < UNSENT_MAX_BYTES:
                self._channel.send(self._summary(self._runtime))
            await asyncio.sleep(SUMMARY_S)

    def _summary(self, runtime: Runtime) -> Summary:
        n_arrived, ended = runtime.seen.take()
        ended_moves, ended_requests = runtime.ledger.take()
        return Summary(
            os.getpid(),
            **runtime.tally(),
            n_arrived=n_arrived,
            ended=ended,
            unfinished=runtime.unfinished(),
            event_log_failure=self._event_log_failure(),
            moves=runtime.lookout.moves(),
            ended_moves=ended_moves,
            ended_requests=ended_requests,
            oldest=runtime.lookout.oldest(),
            in_use=runtime.elastic.in_use(),
        )

    def _follow_fleet(self) -> None:
        """Attach to new instances in the background; empty and release those that are draining or gone."""
        if self._runtime is None or self._fleet_news is None:
            return
        self._runtime.fleet.pairs.foreign = frozenset(self._fleet_news.broken_pairs)
        records = self._runtime.fleet.records
        news_of = {news.instance_id: news for news in self._fleet_news.instances}
        for instance_id, news in news_of.items():
            if instance_id not in records and news.drain_ends_s is None:
                self._runtime.elastic.adopt(instance_id, self._make_engine(instance_id), self._origin_of(news))
                self._known.add(instance_id)
            elif instance_id in records:
                records[instance_id].supervisor.restarts = news.restarts
                if news.role:
                    self._follow_terms(instance_id, InstanceTerms(Role(news.role), news.step_tokens))
                if news.condemned is not None:
                    self._condemn(instance_id, news.condemned)
                if news.drain_ends_s is not None:
                    self._drain(instance_id, max(0.0, news.drain_ends_s - time.monotonic()))
        for instance_id in [i for i in records if i not in news_of]:
            self._condemn(instance_id, "process 0 has removed it")
            self._drain(instance_id, 0.0)

    def _follow_terms(self, instance_id: InstanceId, terms: InstanceTerms) -> None:
        assert self._runtime is not None
        if (kind := self._runtime.fleet.follow_terms(instance_id, terms)) is not None:
            self._runtime.emit(InstanceChanged(f"terms:{instance_id}", instance_id, kind))

    def _follow_layout(self) -> None:
        if self._runtime is not None and self._layout_news is not None:
            self._runtime.emit(LayoutAnnounced("layout", self._layout_news.layout(), self._layout_news.prefill()))

    def _condemn(self, instance_id: InstanceId, why: str) -> None:
        """
        Process 0 ends the instance: no request is to blame for the death that this process is about to notice. Once
        noticed, the news is outdated.
        """
        assert self._runtime is not None
        state = self._runtime.fleet[instance_id]
        if state.engine is not None:
            state.supervisor.condemn(state.engine, why)

    def _drain(self, instance_id: InstanceId, timeout_s: float) -> None:
        assert self._runtime is not None
        if self._runtime.fleet[instance_id].drain is None:
            with contextlib.suppress(ScalingRefusedError):  # no other is attached yet
                self._runtime.elastic.drain(instance_id, timeout_s)

    # --- Admin --------------------------------------------------------------------------------------------------------

    async def snapshot(self) -> dict[str, Any]:
        """See FrontEnds.snapshot."""
        return await self._shown(Look)

    async def picture(self) -> dict[str, Any]:
        """See FrontEnds.picture."""
        return await self._shown(LookAtPicture)

    async def story(self, request_id: RequestId) -> dict[str, Any] | None:
        """See Admin."""
        own = self._own_story(request_id)
        if own is not None:
            return own
        answer = await self._ask(lambda number: TellStory(number, request_id))
        assert isinstance(answer, Shown), answer
        return answer.content

    def _own_story(self, request_id: RequestId) -> dict[str, Any] | None:
        """Of a request of this process; None if it has no such request."""
        return None if self._runtime is None else self._runtime.lookout.story(request_id)

    async def rolled(self) -> dict[str, Any]:
        """See Admin."""
        return await self._shown(LookAtRoll)

    async def roll(self, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """See Admin."""
        return await self._shown(lambda number: BeginRoll(number, list(options), timeout_s), CHECK_TIMEOUT_S)

    async def _shown(
        self, make: Callable[[int], Question], answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        answer = await self._ask(make, answer_timeout_s)
        assert isinstance(answer, Shown), answer
        assert answer.content is not None
        return answer.content

    async def add(self, count: int) -> list[InstanceId]:
        """See Elasticity.add."""
        answer = await self._ask(lambda number: AddInstances(number, count))
        assert isinstance(answer, Added), answer
        return answer.instance_ids

    async def drain(self, instance_id: InstanceId, timeout_s: float) -> InstanceId:
        """See Elasticity.drain."""
        answer = await self._ask(lambda number: DrainInstance(number, instance_id, timeout_s))
        assert isinstance(answer, Drains), answer
        return answer.instance_id

    async def _ask(
        self, make: Callable[[int], Question], answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> Shown | Added | Drains:
        answer = await self._questions.ask(self._channel.send, make, answer_timeout_s)
        match answer:
            case UnknownInstance():
                raise UnknownInstanceError(answer.instance_id)
            case Refused():
                raise ScalingRefusedError(answer.reason)
            case WrongOptions():
                raise ConfigError(answer.reason)
            case Unanswered():
                raise TimeoutError
            case _:
                return answer
