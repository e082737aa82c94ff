"""
The process beside a server that speaks with Ray: `python -m cascadeinfer.cluster.ray_side DESCRIPTOR`.

It answers the server's questions (`ray_messages.py`) and tells what happens to its engines. It ends with the server,
and takes nothing with it: engines belong to detached actors.
"""

import asyncio
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.cluster.keeping import TOLD, Told
from cascadeinfer.cluster.ray_messages import (
    ADDRESS_OPTION,
    Answer,
    Ask,
    AskedToEnd,
    Check,
    Connect,
    Failed,
    Find,
    Forget,
    Heard,
    KillOne,
    Question,
    ReadKey,
    ReadRecord,
    Start,
    StopOne,
    Take,
    Value,
    WriteRecord,
)
from cascadeinfer.core.errors import CascadeError, ConfigError
from cascadeinfer.core.types import InstanceId

if TYPE_CHECKING:  # seconds of imports
    from cascadeinfer.cluster.ray_cluster import RayCluster

UNAVAILABLE_PAUSE_S: Final = 1.0


class RaySide:
    """See the module header."""

    def __init__(self, channel: Channel[Ask]) -> None:
        """
        Args:
            channel: To the server.
        """
        self._channel = channel
        self._made: RayCluster | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: dict[InstanceId, asyncio.Task[None]] = {}

    @property
    def _cluster(self) -> "RayCluster":
        assert self._made is not None, "Connect is the first question"
        return self._made

    async def serve(self) -> None:
        """Answer questions until the server is gone."""
        async for ask in self._channel.messages():
            self._spawn(self._answer(ask))

    def _spawn(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, ask: Ask) -> None:
        import ray.exceptions  # noqa: PLC0415 - seconds, which the server does not wait for

        try:
            value = await self._value_of(ask.number, ask.question)
        except CascadeError as error:
            self._channel.send(Failed.of(ask.number, error))
        except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
            message = f"Ray: {' '.join(str(error).split())[:500]}"
            self._channel.send(Failed(ask.number, "engine", message))
        except Exception as error:  # a fault of ours: whoever has asked waits
            self._channel.send(Failed(ask.number, "engine", f"{type(error).__name__}: {error}"))
            raise
        else:
            self._channel.send(Answer(ask.number, value))

    async def _value_of(self, number: int, question: Question) -> Value:  # noqa: PLR0911, PLR0912, C901 - a table
        if isinstance(question, Connect):
            await self._connect(number, question)
            return None
        cluster = self._cluster
        match question:
            case Take(fleet, user, asks_to_end, must_exist):
                taken = await cluster.take(fleet, user, asks_to_end=asks_to_end, must_exist=must_exist)
                if taken is None:
                    self._spawn(self._until_asked_to_end())
                return str(taken) if taken is not None else None
            case Find():
                found: list[str] = await cluster.find()
                for instance_id in found:
                    self._follow(instance_id)
                return found
            case Check(n_instances, need, path, version):
                from cascadeinfer.cluster import ray_nodes  # noqa: PLC0415 - loaded already

                return list(dict.fromkeys(await ray_nodes.check(n_instances, need, path, version)))
            case Start(instance_id, need, module, content, key, environment, version):
                await cluster.start(instance_id, need, (module, content, key, environment), version)
                self._follow(instance_id)
                return None
            case StopOne(instance_id, timeout_s):
                if (following := self._following.pop(instance_id, None)) is not None:
                    following.cancel()
                await cluster.end(instance_id, timeout_s)
                return None
            case KillOne(instance_id):
                if (engine := cluster.engine(instance_id)) is not None:
                    await engine.actor.kill.remote()
                return None
            case ReadRecord():
                return await cluster.record()
            case WriteRecord(record):
                await cluster.write(record)
                return None
            case ReadKey():
                return await cluster.key()
            case Forget():
                await cluster.forget()
                return None

    async def _connect(self, number: int, question: Connect) -> None:
        from cascadeinfer.cluster import ray_cluster  # noqa: PLC0415 - imports Ray

        loop = asyncio.get_running_loop()

        def refuse(why: str) -> None:
            loop.call_soon_threadsafe(self._refuse, number, why)

        await asyncio.to_thread(ray_cluster.connect, question.address, question.host, refuse)
        self._made = ray_cluster.RayCluster()

    def _refuse(self, number: int, why: str) -> None:
        """Ray goes on trying with a token that is wrong: this process does not."""
        self._channel.send(Failed.of(number, ConfigError(why, option=ADDRESS_OPTION)))
        self._channel.close()

    async def _until_asked_to_end(self) -> None:
        await self._cluster.until_asked_to_end()
        self._channel.send(AskedToEnd())

    def _follow(self, instance_id: InstanceId) -> None:
        if (before := self._following.pop(instance_id, None)) is not None:
            before.cancel()
        self._following[instance_id] = self._spawn(self._until_ended(instance_id))

    async def _until_ended(self, instance_id: InstanceId) -> None:
        """Tell what happens to an engine."""
        import ray.exceptions  # noqa: PLC0415 - loaded already

        engine = self._cluster.engine(instance_id)
        assert engine is not None, "it has been found or started"
        seen, told = 0, Told("starting")
        while told.state != "ended":
            stage = None
            try:
                seen, packed, stage = await engine.actor.follow.remote(seen)
                told = TOLD.decode(packed)
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_PAUSE_S)  # its node may answer again; the connection to it says more
                continue
            except ray.exceptions.RayError as error:
                told = Told("ended", None, None, death_in_words(error, engine.address))
            self._channel.send(Heard(instance_id, told, stage, engine.address))


def death_in_words(error: BaseException, address: str) -> str:
    """Why an actor is gone."""
    text = " ".join(str(error).split())
    if "node" in text and ("died" in text or "dead" in text or "failed" in text):
        return f"its node {address} is gone"
    return f"its keeper on {address} is gone"


async def run(descriptor: int) -> None:
    """Serve the server at the other end of a socket pair."""
    end = socket.socket(fileno=descriptor)
    channel = await Channel[Ask].open(end, Ask)
    await RaySide(channel).serve()


def main() -> NoReturn:
    """Run until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the server's to obey
    loop = asyncio.new_event_loop()
    loop.run_until_complete(run(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # threads may wait inside Ray for ever; what belongs to this process there ends with it


if __name__ == "__main__":
    main()
