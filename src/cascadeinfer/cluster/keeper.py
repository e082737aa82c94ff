"""
The keeper of one engine: a light process beside it, to which it belongs.

    python -m cascadeinfer.cluster.keeper FOLDER MODULE

It runs MODULE, which becomes the engine, and is vLLM's client number 0 of it: it answers the engine's handshake and
takes what is sent to nobody else. It serves no requests; front ends attach to the engine itself. So an engine does not
end with a front end, and whoever starts a keeper can go away.

The keeper ends with its engine, and the engine with its keeper, however either ends. In FOLDER, which only this user
can enter, it keeps

    control            a socket on which it says how the engine is, and is told to end it (`keeping.py`)
    ended              why the engine ended, when it has
    handshake, input, output   the engine's sockets to its client number 0
    door               where the engine lets front ends attach, written by the engine when it is ready

Nothing of vLLM is imported here: an engine's keeper costs some 30 MB.
"""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio

from cascadeinfer.cluster.keeping import (
    CONTROL,
    DOOR,
    ENDED,
    KEEPER_PIPE_VARIABLE,
    ORDERS,
    STARTER_PIPE_VARIABLE,
    Kill,
    Stop,
    Told,
    as_line,
    write_whole,
)
from cascadeinfer.cluster.shared_memory import Segments

DOOR_POLL_S: Final = 0.05
LAST_WORDS_S: Final = 5.0
"""Time that listeners have to read why the engine ended."""
ALONE: Final = "what had started it is gone"


class Keeper:
    """See the module header."""

    def __init__(self, folder: Path, module: str) -> None:
        """
        Args:
            folder: The instance's.
            module: Run as the engine, with the folder as its argument.
        """
        self._folder = folder
        self._module = module
        self._told = Told("starting")
        self._listeners: set[asyncio.StreamWriter] = set()
        self._segments = Segments()
        self._process: asyncio.subprocess.Process | None = None
        self._asked: str | None = None
        self._is_alone = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def keep(self) -> None:
        """Start the engine; returns when it has ended and everybody who listens knows."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: self._spawn(self._stop(LAST_WORDS_S)))
        context = zmq.asyncio.Context()
        if (starter := os.environ.pop(STARTER_PIPE_VARIABLE, None)) is not None:
            loop.add_reader(int(starter), self._on_starters_end, int(starter))
        server = await asyncio.start_unix_server(self._serve, self._folder / CONTROL)
        lifeline, held = os.pipe()
        try:
            handshake = self._bound(context, zmq.ROUTER, "handshake")
            inputs, outputs = self._bound(context, zmq.ROUTER, "input"), self._bound(context, zmq.PULL, "output")
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module, str(self._folder)),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, KEEPER_PIPE_VARIABLE: str(lifeline)},
                pass_fds=[lifeline],
                start_new_session=True,
            )
            os.close(lifeline)
            if self._is_alone:
                self._kill(ALONE)
            self._tell(Told("starting", process.pid))
            attending = [
                asyncio.ensure_future(work)
                for work in (self._shake_hands(handshake), drained(inputs), drained(outputs))
            ]
            opening = asyncio.ensure_future(self._until_open(process.pid))
            code = await process.wait()
            for task in (*attending, opening):
                task.cancel()
            await asyncio.gather(*attending, opening, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, if it left any
            why = self._asked or how_it_ended(code)
            write_whole(self._folder / ENDED, why.encode())
            self._tell(Told("ended", None, None, why))
        finally:
            self._segments.remove()
            server.close()
            await self._let_listeners_go()
            os.close(held)
            context.destroy(linger=0)

    def _on_starters_end(self, pipe: int) -> None:
        """Nothing is ever sent on this pipe: it ends with whoever started the keeper."""
        asyncio.get_running_loop().remove_reader(pipe)
        self._is_alone = True
        self._kill(ALONE)

    def _bound(self, context: zmq.asyncio.Context, kind: int, name: str) -> zmq.asyncio.Socket:
        sock = context.socket(kind)
        sock.setsockopt(zmq.RCVHWM, 0)
        sock.bind(f"ipc://{self._folder / name}")
        return sock

    async def _shake_hands(self, sock: zmq.asyncio.Socket) -> None:
        """VLLM's handshake: the engine says HELLO, is told where its clients are, and says READY."""
        addresses = {"inputs": [f"ipc://{self._folder}/input"], "outputs": [f"ipc://{self._folder}/output"]}
        answer = msgspec.msgpack.encode({"addresses": addresses, "parallel_config": {}})
        while True:
            identity, message = await sock.recv_multipart()
            if msgspec.msgpack.decode(message)["status"] == "HELLO":
                await sock.send_multipart([identity, answer])

    async def _until_open(self, pid: int) -> None:
        """Wait until the engine has written where it listens."""
        door = self._folder / DOOR
        while not door.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(DOOR_POLL_S)
        self._segments.remember_all_of(pid)
        self._tell(Told("ready", pid, door.read_text(encoding="utf-8")))

    # --- who listens -------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: it is told how the engine is, at once and at every change, and may give orders."""
        self._listeners.add(writer)
        writer.write(as_line(self._told))
        try:
            while line := await reader.readline():
                match ORDERS.decode(line):
                    case Stop(timeout_s):
                        self._spawn(self._stop(timeout_s))
                    case Kill():
                        self._kill("it was killed by its front end")
        except (OSError, msgspec.MsgspecError) as error:
            sys.stderr.write(f"keeper: a listener was let go: {error}\n")  # into the instance's log
        finally:
            self._listeners.discard(writer)
            writer.close()

    def _tell(self, told: Told) -> None:
        self._told = told
        for writer in self._listeners:
            writer.write(as_line(told))

    async def _let_listeners_go(self) -> None:
        """Once they have read the last word, or had the time to; some leave meanwhile."""
        for writer in tuple(self._listeners):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.drain(), LAST_WORDS_S)
            writer.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- its end -----------------------------------------------------------------------------------------------------

    async def _stop(self, timeout_s: float) -> None:
        """Ask the engine to end; kill it after the time-out."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._asked = "it was stopped"
        self._segments.remember_all_of(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait([asyncio.ensure_future(process.wait())], timeout=timeout_s)
        self._kill(self._asked)

    def _kill(self, why: str) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._asked = why
        self._segments.remember_all_of(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def drained(sock: zmq.asyncio.Socket) -> None:
    """Take and forget what arrives."""
    while True:
        await sock.recv_multipart(copy=False)


def how_it_ended(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


def main() -> None:
    """Keep one engine. Its folder stays, with its log, until somebody looks for living engines."""
    folder, module = sys.argv[1:]
    asyncio.run(Keeper(Path(folder), module).keep())


if __name__ == "__main__":
    main()
