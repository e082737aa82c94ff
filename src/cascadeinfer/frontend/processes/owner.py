"""
Process 0's side: starts the followers, keeps them alive, sends them news of instances and stages, answers for all.

A follower that dies takes its clients' connections with it. The requests it left in the instances are aborted, and a
new follower is started in its place, after a pause that doubles with every consecutive failure.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, assert_never

from prometheus_client import multiprocess

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.cluster.local import exit_of
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import SeenEnd, SeenLive, WorkloadSeen
from cascadeinfer.core.silence import Silence
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.engines.vllm.attachment import AnyAttachment
from cascadeinfer.frontend.admin import OwnRuntime
from cascadeinfer.frontend.processes.answers import answer
from cascadeinfer.frontend.processes.messages import (
    AddInstances,
    BeginRoll,
    DrainInstance,
    FleetNews,
    FromFollower,
    InstanceNews,
    LayoutNews,
    Look,
    LookAtPicture,
    LookAtRoll,
    Shown,
    Stop,
    Summary,
    TellStory,
    Unanswered,
)
from cascadeinfer.frontend.processes.questions import Questions
from cascadeinfer.frontend.processes.totals import add_load, add_migrations, add_oldest, shown
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.view import InstanceRecord

logger = logging.getLogger(__name__)

LOOK_S = 0.05
"""Polling interval; also the longest delay before followers learn of a death."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 30.0
FORGET_TIMEOUT_S = 10.0
HANG_S = 60.0
"""A follower that has served and is then silent for this long is killed."""
PICTURE_S = 0.5
"""How long a picture serves all viewers, whichever process they ask; each process asks once a second."""
STORY_TIMEOUT_S = 3.0
"""Time for the followers to say whether a request is theirs; less than one of them waits for process 0."""
EXIT_TIMEOUT_S = 10.0
"""Time for a drained follower to exit before it is killed."""
NOT_ACCEPTING = 2**31 - 1
"""The load by which vLLM's server recognises a process that accepts no connections."""


@dataclass(slots=True)
class FollowerState:
    """
    The state of one follower.

    Attributes:
        index: Its number among the processes, from 1; also its client index at the instances.
        summary: Its last summary; None until the first, which it sends once it serves.
        silence: Time since its last summary.
        said: The last news sent to it.
        questions: Those that wait for its answer.
    """

    index: int
    process: BaseProcess | None = None
    channel: Channel[FromFollower] | None = None
    summary: Summary | None = None
    silence: Silence = field(default_factory=lambda: Silence(HANG_S))
    restarts: int = 0
    said: dict[type, Any] = field(default_factory=dict)
    questions: Questions = field(default_factory=Questions)


class FrontEnds:
    """All processes, as process 0 sees them; `loads` as given. See `cascadeinfer.frontend.admin.Admin`."""

    def __init__(
        self,
        n_processes: int,
        runtime: Runtime,
        start_process: Callable[[int, socket.socket], BaseProcess],
        attachment_of: Callable[[Engine, int], Awaitable[AnyAttachment | None]],
        loads: MutableSequence[int],
        event_log_failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            n_processes: Total number of processes.
            runtime: Process 0's runtime, which owns the instances. It need not be started yet.
            start_process: Starts the follower with this number, given its end of a socket pair.
            attachment_of: Makes an instance serve the follower with this number and returns what it must know; None
                while the instance is not up.
            loads: Shared counts of open connections per process, so that the least loaded one accepts.
            event_log_failure: Why process 0 writes no event log although one was requested.
        """
        self._runtime = runtime
        self._own = OwnRuntime(runtime)
        self._start_process = start_process
        self.loads = loads
        self._event_log_failure = event_log_failure
        self._followers = [FollowerState(index) for index in range(1, n_processes)]
        self._attachment_of = attachment_of
        self._tasks: list[asyncio.Task[None]] = []
        self._instances_started = False
        self._slept_s = 0.0
        self._drawn: tuple[float, dict[str, Any]] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._stopping = False

    def start(self) -> None:
        """Start the followers; they wait until the instances are up."""
        self._runtime.elastic.used_elsewhere = self._is_used
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep(follower)) for follower in self._followers]
        self._tasks.append(loop.create_task(self._tell_news()))

    def instances_started(self) -> None:
        """The initial instances are up: followers may begin."""
        self._instances_started = True

    def tell_stop(self, at_once: bool) -> None:
        """Have all followers drain, or exit at once."""
        self._stopping = True
        for follower in self._followers:
            if follower.channel is not None:
                follower.channel.send(Stop(at_once))

    async def stop(self, timeout_s: float) -> None:
        """Wait until all followers have drained and exited; kill those that are late."""
        self.tell_stop(at_once=False)
        for follower in self._followers:
            if follower.summary is None and follower.process is not None:
                follower.process.kill()  # it does not serve yet, and may not listen before it has imported everything
        with contextlib.suppress(TimeoutError):
            exits = [exit_of(f.process) for f in self._followers if f.process is not None]
            await within(timeout_s + EXIT_TIMEOUT_S, asyncio.gather(*exits))
        tasks = [*self._tasks, *self._answering]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for follower in self._followers:
            if follower.process is not None:
                follower.process.kill()
                await asyncio.to_thread(follower.process.join)

    # --- Admin --------------------------------------------------------------------------------------------------------

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `/admin/instances` over all processes; followers' data is as old as their last summary."""
        everything = self._runtime.snapshot()
        for summary in self._summaries():
            add_load(everything, summary)
            add_migrations(everything, summary)
        return {**everything, "front_ends": self._front_ends()}

    async def picture(self) -> dict[str, Any]:
        """The picture over all processes (`runtime/picture.py`); `front_ends` as in the snapshot."""
        now_s = time.monotonic()
        if self._drawn is None or now_s - self._drawn[0] > PICTURE_S:
            everything = self._runtime.lookout.picture()
            for summary in self._summaries():
                add_load(everything, summary)
                everything["moves"]["under_way"] += [move.shown() for move in summary.moves]
            add_oldest(everything, self._runtime.lookout.oldest(), self._summaries(), now_s)
            self._drawn = now_s, {**everything, "front_ends": self._front_ends()}
        return self._drawn[1]

    async def story(self, request_id: RequestId) -> dict[str, Any] | None:
        """See Admin."""
        return await self._story(request_id, self._followers)

    async def _story(self, request_id: RequestId, others: Iterable[FollowerState]) -> dict[str, Any] | None:
        """Of a request of process 0 or of these followers. Raises TimeoutError where one of them may have it."""
        own = self._runtime.lookout.story(request_id)
        asked = [f for f in others if f.summary is not None and f.channel is not None]
        if own is not None or not asked:
            return own
        told = await asyncio.gather(*(self._story_of(f, request_id) for f in asked), return_exceptions=True)
        found = next((story for story in told if isinstance(story, dict)), None)
        failed = next((story for story in told if isinstance(story, BaseException)), None)
        if found is None and failed is not None:
            raise failed
        return found

    @staticmethod
    async def _story_of(follower: FollowerState, request_id: RequestId) -> dict[str, Any] | None:
        assert follower.channel is not None
        answer = await follower.questions.ask(
            follower.channel.send, lambda number: TellStory(number, request_id), STORY_TIMEOUT_S
        )
        assert isinstance(answer, Shown), answer
        return answer.content

    async def _tell_story(self, asker: FollowerState, channel: Channel[FromFollower], question: TellStory) -> None:
        """Answer a follower, whose request it is not."""
        others = [follower for follower in self._followers if follower is not asker]
        try:
            channel.send(Shown(question.number, await self._story(question.request_id, others)))
        except TimeoutError:
            channel.send(Unanswered(question.number))

    async def add(self, count: int) -> list[InstanceId]:
        """See Admin."""
        return await self._own.add(count)

    async def drain(self, instance_id: InstanceId, timeout_s: float) -> InstanceId:
        """See Admin."""
        return await self._own.drain(instance_id, timeout_s)

    async def rolled(self) -> dict[str, Any]:
        """See Admin."""
        return await self._own.rolled()

    async def roll(self, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """See Admin."""
        return await self._own.roll(options, timeout_s)

    def _is_used(self, instance_id: InstanceId) -> bool:
        """Whether a follower that serves may send requests to an instance, or has some there, as it said last."""
        return any(instance_id in summary.in_use for summary in self._summaries())

    def _summaries(self) -> list[Summary]:
        """The last ones of the followers that serve."""
        return [follower.summary for follower in self._followers if follower.summary is not None]

    def _front_ends(self) -> list[dict[str, Any]]:
        return [shown(0, os.getpid(), 0, self._own_summary())] + [
            shown(f.index, None if f.process is None else f.process.pid, f.restarts, f.summary) for f in self._followers
        ]

    def _own_summary(self) -> Summary:
        return Summary(
            os.getpid(),
            **self._runtime.tally(),
            n_arrived=0,
            ended=[],
            unfinished=[],
            event_log_failure=self._event_log_failure(),
        )

    # --- one follower -------------------------------------------------------------------------------------------------

    async def _keep(self, follower: FollowerState) -> None:
        """Restart a follower whenever it exits, until all stop."""
        failures = 0
        while not self._stopping:
            try:
                await self._one_life(follower)
            except Exception:  # no process to be had, our own bug: the next life may do better
                logger.exception("internal error; front-end process %s is started again", follower.index)
                if follower.process is not None:
                    follower.process.kill()
            if self._stopping:
                return
            failures = 0 if follower.summary is not None else failures + 1
            follower.summary = None
            self._runtime.emit(WorkloadSeen(f"process:{follower.index}", str(follower.index), 0, (), ()))
            logger.error("front-end process %s ended: its clients are disconnected, another one starts", follower.index)
            await self._forget(follower.index)
            await asyncio.sleep(min(BACKOFF_FIRST_S * 2**failures, BACKOFF_MAX_S))
            follower.restarts += 1

    async def _one_life(self, follower: FollowerState) -> None:
        ours, its = socket.socketpair()
        with its:
            # In a thread: this blocks until the spawned process has received everything it needs.
            follower.process = await asyncio.to_thread(self._start_process, follower.index, its)
        follower.channel = await Channel[FromFollower].open(ours, FromFollower)
        follower.said = {}
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(self._listen(follower, follower.channel))
                await exit_of(follower.process)
                listening.cancel()
        finally:
            follower.channel.close()
            follower.channel = None
            self.loads[follower.index] = NOT_ACCEPTING
        multiprocess.mark_process_dead(follower.process.pid)  # type: ignore[no-untyped-call]

    async def _listen(self, follower: FollowerState, channel: Channel[FromFollower]) -> None:
        async for message in channel.messages():
            match message:
                case Summary():
                    follower.summary = message
                    follower.silence.heard()
                    self._runtime.elastic.look_at_all()
                    for move in message.ended_moves:
                        self._runtime.ledger.enter_move(move)
                    self._runtime.ledger.enter_requests(message.ended_requests)
                    self._runtime.emit(
                        WorkloadSeen(
                            f"process:{follower.index}",
                            str(follower.index),
                            message.n_arrived,
                            tuple([SeenEnd(*end) for end in message.ended]),
                            tuple([SeenLive(*live) for live in message.unfinished]),
                        )
                    )
                case TellStory():  # of which others may have to be asked
                    self._answer_later(self._tell_story(follower, channel, message))
                case Look() | LookAtPicture() | LookAtRoll() | AddInstances() | DrainInstance() | BeginRoll():
                    self._answer_later(answer(self, message, channel.send))
                case Shown():
                    follower.questions.answered(message)
                case _:
                    assert_never(message)

    def _answer_later(self, answering: Coroutine[Any, Any, None]) -> None:
        """Answer beside whatever else the follower says, such as that it has left an instance that drains."""

        def answered(task: asyncio.Task[None]) -> None:
            self._answering.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("internal error while a follower was answered", exc_info=error)

        task = asyncio.create_task(answering)
        self._answering.add(task)
        task.add_done_callback(answered)

    async def _forget(self, index: int) -> None:
        """Abort the requests that a dead follower left."""
        for engine in self._runtime.live_engines():
            try:
                n_left = await within(FORGET_TIMEOUT_S, engine.forget_client(index))
                if n_left is not None:  # else it notices by itself
                    logger.warning("instance %s: %s requests of process %s aborted", engine.instance_id, n_left, index)
            except (EngineError, TimeoutError) as error:  # it dies, or is found hung
                logger.warning("instance %s does not forget process %s: %s", engine.instance_id, index, error)

    # --- news ---------------------------------------------------------------------------------------------------------

    async def _tell_news(self) -> None:
        while True:
            looked_s = time.monotonic()
            await asyncio.sleep(LOOK_S)
            self._slept_s = time.monotonic() - looked_s
            try:
                for follower in self._followers:
                    if follower.channel is not None and self._instances_started:
                        await self._tell_news_to(follower)
            except Exception:  # our own bug must not leave the followers without news for ever
                logger.exception("internal error while followers were told the news")

    async def _tell_news_to(self, follower: FollowerState) -> None:
        self._look_after(follower)
        instances = [await self._news_of(state, follower.index) for state in self._runtime.fleet]
        broken_pairs = tuple([pair.instance_ids for pair in self._runtime.fleet.pairs.broken()])
        self._say(follower, FleetNews(instances, broken_pairs))
        if (layout := self._runtime.fleet.layout) is not None:
            self._say(follower, LayoutNews.of(layout, self._runtime.fleet.prefill))

    def _look_after(self, follower: FollowerState) -> None:
        """Watch for a hung follower: it would block its clients, its requests and its place on the listening socket."""
        if follower.summary is None or follower.process is None:
            return
        follower.silence.looked(LOOK_S, self._slept_s)
        if follower.silence.is_over:
            logger.error("front-end process %s says nothing for %g s: it is killed", follower.index, HANG_S)
            follower.summary = None
            follower.process.kill()

    @staticmethod
    def _say(follower: FollowerState, news: FleetNews | LayoutNews) -> None:
        if follower.channel is not None and follower.said.get(type(news)) != news:
            follower.said[type(news)] = news
            follower.channel.send(news)

    async def _news_of(self, state: InstanceRecord, index: int) -> InstanceNews:
        attachment = None if state.engine is None else await self._attachment_of(state.engine, index)
        return InstanceNews.of(state, attachment)
