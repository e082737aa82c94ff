"""Finds the engines of `--cluster static` at the start, and follows them afterwards."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.addresses import EngineAddress, host_and_port, resolve
from cascadeinfer.cluster.knocking import About, KeyRefusedError
from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.placing.evacuation import MAX_MIGRATIONS_PER_INSTANCE
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.configuration import attached_config
from cascadeinfer.engines.vllm.standing import Terms, look_at, maker_of
from cascadeinfer.runtime.discovery import Discovery, MakeEngine
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
REST_S: Final = 5.0
"""Once one engine answers, time for others that start at the same moment."""
SAID_EVERY_S: Final = 10.0


class StandingEngines:
    """
    The engines that the options name.

    Attributes:
        first: Those that answered at the start, in order.
    """

    def __init__(self, engines: str, key_file: str, own_host: str | None) -> None:
        """
        Args:
            engines: HOST:PORT,HOST:PORT.
            key_file: The cluster's key.
            own_host: The address on which engines reach this process; None: the one by which each is reached.

        Raises:
            ConfigError: An address or the key file is none.
        """
        self._entries = tuple(host_and_port(text, "--engines") for text in engines.split(","))
        self._key = ClusterKey.read(Path(key_file), "--cluster-key")
        self._own_host = own_host
        self._terms: Terms | None = None
        self._unknown_names: list[str] = []
        self.first: tuple[EngineAddress, ...] = ()

    async def find(self, n_wanted: int | None) -> None:
        """
        Wait until engines answer.

        Args:
            n_wanted: How many; None: those that answer within a moment of the first.

        Raises:
            ConfigError: Somebody listens at an address who does not have the key.
        """
        said_s, first_s = -SAID_EVERY_S, 0.0
        while True:
            listed = await self.listed() or []
            about = await asyncio.gather(*map(self._look, listed))
            there = tuple(address for address, one in zip(listed, about, strict=True) if one is not None)
            now_s = time.monotonic()
            first_s = (first_s or now_s) if there else 0.0
            if n_wanted is None:
                enough = bool(there) and (len(there) == len(listed) or now_s - first_s >= REST_S)
            else:
                enough = len(there) >= n_wanted
            if enough:
                self.first = there[:n_wanted]
                return
            if now_s - said_s >= SAID_EVERY_S:
                said_s = now_s
                logger.info("waiting for engines: %s of %s answer", len(there), n_wanted or len(listed) or "none")
            await asyncio.sleep(LOOK_S)

    async def _look(self, address: EngineAddress) -> About | None:
        try:
            return await look_at(address, self._key)
        except KeyRefusedError as error:
            raise ConfigError(
                str(error), option="--engines, --cluster-key", fix="give both ends the same key file"
            ) from error

    async def listed(self) -> list[EngineAddress] | None:
        """All addresses behind the names now; None while a name cannot be looked up."""
        listed, unknown = await resolve(self._entries)
        if unknown and unknown != self._unknown_names:
            logger.warning("names of engines cannot be looked up: %s", "; ".join(unknown))
        self._unknown_names = unknown
        return None if unknown else listed

    async def _engine_at(self, address: EngineAddress) -> str | None:
        try:
            about = await look_at(address, self._key)
        except KeyRefusedError as error:
            logger.debug("%s", error)
            return None
        return None if about is None else about.engine_id

    def make_engines(self, engine_args: AsyncEngineArgs, lease_s: int) -> dict[InstanceId, MakeEngine]:
        """
        What makes the engines that answered at the start.

        Args:
            engine_args: Of the model, as this front end knows it.
            lease_s: How long engines must keep the blocks of a request that moves away.
        """
        config = attached_config(engine_args)
        self._terms = Terms(config, self._key, lease_s, MAX_MIGRATIONS_PER_INSTANCE, self._own_host)
        return {
            str(index): maker_of(address, self._terms)(str(index), index) for index, address in enumerate(self.first)
        }

    @contextlib.asynccontextmanager
    async def followed(self, runtime: Runtime, drain_timeout_s: float) -> AsyncIterator[None]:
        """While this lasts, engines that come join the runtime, and those that are no longer listed leave it."""
        terms = self._terms
        assert terms is not None, "make_engines comes first"

        def make(address: EngineAddress, instance_id: InstanceId, index: int) -> MakeEngine:
            return maker_of(address, terms)(instance_id, index)

        known = {address: str(index) for index, address in enumerate(self.first)}
        discovery = Discovery(runtime, known, self.listed, self._engine_at, make, drain_timeout_s)
        following = asyncio.get_running_loop().create_task(discovery.run())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
