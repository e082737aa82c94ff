"""
An EngineCore that stands on its own, as seen by a follower: process 0 has found or started it, and says when it is up.

The follower knocks at the engine's door itself (`standing.py`) and becomes one more client of it, which the engine
forgets when the connection ends. Starting it, killing it and connecting it to its peers is the concern of process 0. A
connection that is lost ends this life of the instance; the next one attaches again to the engine that process 0 names,
perhaps the same.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.patience import within
from cascadeinfer.engines.vllm.attachment import AnyAttachment, StandingAttachment
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.configuration import attached_config
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.standing import StandingCore, Terms

NEWS_S: Final = 1.0
"""Time for process 0 to say why a connection has ended; it looks twenty times a second."""


class FollowedCore:
    """See the module header, and `cascadeinfer.engines.vllm.instance.EngineCoreLife`."""

    def __init__(
        self,
        instance_id: InstanceId,
        vllm_config: VllmConfig,
        attach: Callable[["FollowedCore"], Awaitable[AnyAttachment]],
    ) -> None:
        """
        Args:
            instance_id: Its name.
            vllm_config: This process's, for what the front end reads from it.
            attach: Waits until process 0 says that it is up, and arranges for `died` to be called when it goes down.
        """
        self.instance_id = instance_id
        self.index = -1
        self.stopped = False
        self._config = vllm_config
        self._attach = attach
        self._is_down = asyncio.Event()
        self._core: StandingCore | None = None
        self._attaching: asyncio.Future[EngineChannel] | None = None

    @property
    def vllm_config(self) -> VllmConfig:
        """Its configuration, completed by its start."""
        return self._config if self._core is None else self._core.vllm_config

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore, on its machine."""
        return None if self._core is None else self._core.pid

    async def begin(self) -> EngineChannel:
        """Wait until it is up, and attach to it, unless it goes down meanwhile."""
        told = await self._attach(self)
        assert isinstance(told, StandingAttachment), told
        self.index = told.index
        terms = Terms(self._config, told.key, told.lease_s, told.max_migrations, told.own_host, trusts_model=True)
        address = EngineAddress(told.host, told.port)
        core = self._core = StandingCore(self.instance_id, told.index, address, terms, self._until_told)
        attaching = self._attaching = asyncio.ensure_future(core.begin())
        going_down = asyncio.ensure_future(self._is_down.wait())
        try:
            await asyncio.wait((attaching, going_down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (attaching, going_down):
                each.cancel()
            await asyncio.gather(attaching, going_down, return_exceptions=True)
        if self._is_down.is_set():
            raise EngineError("went down while it was attached to", instance_id=self.instance_id)
        channel = attaching.result()
        if channel.hello.engine_id != told.engine_id:
            raise EngineError(f"another engine listens at {address}", instance_id=self.instance_id)
        return channel

    async def _until_told(self) -> None:
        """The connection is lost: whether a request may be to blame is known to process 0."""
        with contextlib.suppress(TimeoutError):  # the engine is up: only this process has lost it
            await within(NEWS_S, self._is_down.wait())

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Nothing to do: process 0 connected it to its peers before saying that it is up."""

    async def forget(self, channel: EngineChannel, client: int) -> None:
        """Nothing to do: it notices by itself which clients are gone."""

    def died(self) -> None:
        """Process 0 says that it is gone."""
        self._is_down.set()
        if self._core is not None:
            self._core.kill()

    def kill(self) -> None:
        """Nothing to do: process 0 notices by itself that an instance hangs, and kills it."""

    async def end(self, timeout_s: float) -> None:
        """Leave it."""
        self.stopped = True
        self._is_down.set()
        if self._attaching is not None:
            self._attaching.cancel()
            await asyncio.gather(self._attaching, return_exceptions=True)
        if self._core is not None:
            await self._core.end(timeout_s)


def followed_factories(
    engine_args: AsyncEngineArgs, attach: Callable[[FollowedCore], Awaitable[AnyAttachment]]
) -> Callable[[InstanceId], Callable[[int], VllmInstance]]:
    """
    Per instance that stands on its own and is process 0's concern, what attaches to it for the n-th time.

    Args:
        engine_args: The operator's.
        attach: See FollowedCore.
    """
    config = attached_config(engine_args)
    return lambda instance_id: lambda _: VllmInstance(FollowedCore(instance_id, config, attach))
