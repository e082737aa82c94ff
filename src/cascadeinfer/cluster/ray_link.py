"""
The serving process's end of its connection to the process beside it that speaks with Ray (`ray_side.py`).

Ray ends its host process when a cluster's head is gone for long, so it never runs in the server. When the process
beside it ends, the server serves on: requests go to engines directly. Only starting and stopping engines fails until
another such process, which is started again and again, has reached the cluster.
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any, Final, Protocol

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.cluster.ray_messages import (
    ADDRESS_OPTION,
    Answer,
    Ask,
    AskedToEnd,
    Failed,
    FromSide,
    Heard,
    Question,
    Value,
)
from cascadeinfer.core.errors import CascadeError, ConfigError, EngineError
from cascadeinfer.core.types import InstanceId

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 30.0
END_TIMEOUT_S: Final = 10.0
RECONNECT_VARIABLE: Final = "RAY_gcs_rpc_server_reconnect_timeout_s"
RECONNECT_S: Final = "600"
"""How long Ray waits for a head that is gone before it ends its host process; its default is 60."""


class SideLostError(CascadeError):
    """The process beside the server has ended; another one is started."""


class Side(Protocol):
    """A process that speaks with Ray, or what stands for one in tests."""

    def start(self) -> socket.socket:
        """Start it; returns our end of its connection."""
        ...

    async def end(self) -> str:
        """Its connection has ended or will be ignored: end it, and return what it said last."""
        ...


class SideProcess:
    """See Side."""

    def __init__(self) -> None:
        """Not started yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> socket.socket:
        """See Side."""
        ours, its = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        with its:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "cascadeinfer.cluster.ray_side", str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={RECONNECT_VARIABLE: RECONNECT_S, "RAY_USAGE_STATS_ENABLED": "0", **os.environ},
                pass_fds=[its.fileno()],
                start_new_session=True,  # signals of our terminal are not for it
            )
        return ours

    async def end(self) -> str:
        """See Side."""
        process, log = self._process, self._log
        if process is None or log is None:
            return ""
        self._process = self._log = None
        try:
            await asyncio.to_thread(process.wait, END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        with log:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"it ended with code {process.returncode}"


class RayLink:
    """See the module header."""

    def __init__(self, side: Side, greeting: Sequence[Question]) -> None:
        """
        Args:
            side: Not started yet.
            greeting: What is asked first on every connection.
        """
        self.heard: Callable[[Heard], None] = lambda _: None
        self.asked_to_end: Callable[[], None] = lambda: None
        #: Called when a lost connection is there again; what it raises ends that one, too.
        self.came_back: Callable[[], Any] | None = None
        self._side = side
        self._greeting = tuple(greeting)
        self._channel: Channel[FromSide] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._waiting: dict[int, tuple[asyncio.Future[Value], InstanceId]] = {}
        self._number = 0
        #: Before that, the fleet may be another's.
        self._is_greeted = False

    async def open(self) -> None:
        """
        Start the process and greet it.

        Raises:
            ConfigError: The cluster cannot be reached or refuses.
        """
        try:
            await self._greet()
        except SideLostError as error:
            last = await self._drop()
            raise ConfigError(f"Ray cannot be used: {last or error}", option=ADDRESS_OPTION) from error
        except BaseException:
            await self._drop()
            raise
        self._is_greeted = True
        self._keeping = asyncio.ensure_future(self._keep())

    async def _greet(self) -> list[Value]:
        channel = self._channel = await Channel[FromSide].open(self._side.start(), FromSide)
        self._reading = asyncio.ensure_future(self._read(channel))
        return [await self._asked(question, "?") for question in self._greeting]

    def greet_with(self, question: Question) -> None:
        """Ask this first on later connections, too; its answer is None when it succeeds."""
        self._greeting = (*self._greeting, question)

    async def ask(self, question: Question, instance_id: InstanceId = "?") -> Value:
        """
        Ask, and wait for the answer.

        Raises:
            SideLostError: The process is gone.
            CascadeError: What the answer says.
        """
        if not self._is_greeted:
            raise SideLostError("Ray cannot be reached")
        return await self._asked(question, instance_id)

    async def _asked(self, question: Question, instance_id: InstanceId) -> Value:
        if self._channel is None or self._reading is None or self._reading.done():
            raise SideLostError("Ray cannot be reached any more")
        self._number += 1
        number = self._number
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (future, instance_id)
        self._channel.send(Ask(number, question))
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    async def ask_of(self, question: Question, instance_id: InstanceId) -> Value:
        """`ask` about an engine; a lost process is its error. Raises EngineError."""
        try:
            return await self.ask(question, instance_id)
        except SideLostError as error:
            raise EngineError(str(error), instance_id=instance_id) from error

    def tell(self, question: Question) -> None:
        """Ask without an interest in the answer; nothing happens if the process is gone."""
        if self._is_greeted and self._channel is not None:
            self._number += 1
            self._channel.send(Ask(self._number, question))

    async def _read(self, channel: Channel[FromSide]) -> None:
        async for message in channel.messages():
            match message:
                case Answer() | Failed():
                    self._on_answer(message)
                case Heard():
                    self.heard(message)
                case AskedToEnd():
                    self.asked_to_end()
        for future, _ in list(self._waiting.values()):
            if not future.done():
                future.set_exception(SideLostError("Ray cannot be reached any more"))

    def _on_answer(self, message: Answer | Failed) -> None:
        future, instance_id = self._waiting.get(message.number, (None, ""))
        if future is None or future.done():  # who has asked did not wait, or waits no more
            if isinstance(message, Failed):
                logger.warning("Ray: %s", message.message)
        elif isinstance(message, Failed):
            future.set_exception(message.as_error(instance_id))
        else:
            future.set_result(message.value)

    async def _keep(self) -> None:
        """Whenever the process has ended, start another one."""
        pause_s = FIRST_PAUSE_S
        while True:
            assert self._reading is not None
            await asyncio.wait([self._reading])
            said = await self._drop()
            logger.warning(
                "the connection to Ray is lost (%s); requests are served on, engines cannot be started or stopped", said
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
            try:
                for refusal in await self._greet():
                    if refusal is not None:
                        raise SideLostError(f"the fleet is used by the server on {refusal}")
                self._is_greeted = True
                if self.came_back is not None:
                    await self.came_back()
            except CascadeError as error:
                logger.warning("Ray: %s", error)
                self._is_greeted = False
                if self._channel is not None:
                    self._channel.close()
                continue
            pause_s = FIRST_PAUSE_S
            logger.warning("the connection to Ray is there again")

    async def _drop(self) -> str:
        channel, self._channel = self._channel, None
        self._is_greeted = False
        if channel is not None:
            channel.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        return await self._side.end()

    async def close(self) -> None:
        """End the process; engines go on."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        await self._drop()
