"""
An EngineCore that a keeper keeps: it is found or started, attached to like one that stands on its own (`standing.py`),
and left or ended.

A fleet's engines outlive the server, so an instance's end is not always its engine's (`Phase`):

    the server starts      an engine that was found goes on; one that was started ends, for the start has failed
    it serves              the engine ends: it has died or hangs, or its instance was drained; but if only the
                           connection was lost (this process was suspended), it goes on, to be attached to again
    it ends                the engine goes on, if it is up
"""

import asyncio
import dataclasses
import enum
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from vllm.config import VllmConfig

from cascadeinfer.cluster.keeping import EngineOrder, Keepers
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.attachment import StandingAttachment
from cascadeinfer.engines.vllm.channel import EngineChannel, connect_both_ways
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.kept_builds import KeptBuilds
from cascadeinfer.engines.vllm.kept_order import MODULE
from cascadeinfer.engines.vllm.standing import StandingCore, Terms

logger = logging.getLogger(__name__)


class Phase(enum.Enum):
    """What the server does; see the module header."""

    STARTS = enum.auto()
    SERVES = enum.auto()
    ENDS = enum.auto()


class KeptCore:
    """See the module header, and `cascadeinfer.engines.vllm.instance.EngineCoreLife`."""

    def __init__(
        self,
        instance_id: InstanceId,
        index: int,
        keepers: Keepers,
        order: EngineOrder,
        terms: Terms,
        *,
        was_found: bool,
        phase: Callable[[], Phase],
    ) -> None:
        """
        Args:
            instance_id: Its name.
            index: Its number.
            keepers: Of its fleet.
            order: To start it, if it does not live.
            terms: Of attaching to it.
            was_found: Whether it lived when the server came.
            phase: What the server does.
        """
        self.instance_id = instance_id
        self.index = index
        self._config = terms.config
        self._keepers = keepers
        self._order = order
        self._terms = terms
        self._was_found = was_found
        self._phase = phase
        self._core: StandingCore | None = None
        self._watch: asyncio.Task[None] | None = None
        self._killed = False
        self._ended = False

    @property
    def vllm_config(self) -> VllmConfig:
        """Its configuration, completed by its start."""
        return self._config if self._core is None else self._core.vllm_config

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore, on its machine."""
        return None if self._core is None else self._core.pid

    async def begin(self) -> EngineChannel:
        """Start it unless it lives, wait until it is ready, attach to it."""
        if not self._keepers.lives(self.instance_id):
            await self._keepers.start(self.instance_id, self._order)
        address = await self._keepers.ready(self.instance_id)
        core = self._core = StandingCore(self.instance_id, self.index, address, self._terms)
        channel = await core.begin()
        self._watch = asyncio.get_running_loop().create_task(self._until_ended(core))
        return channel

    async def _until_ended(self, core: StandingCore) -> None:
        why = await self._keepers.ended(self.instance_id)
        logger.warning("instance %s has ended: %s", self.instance_id, why)
        core.kill()

    async def attachment(self, client: int) -> StandingAttachment | None:
        """What a follower of this process must know of it; None while it is not attached."""
        return None if self._core is None else await self._core.attachment(client)

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Handshake with each peer, both ways, and wait until all are done."""
        await connect_both_ways(channel, peers)

    async def forget(self, channel: EngineChannel, client: int) -> None:
        """Nothing to do: it notices by itself which clients are gone."""

    def kill(self) -> None:
        """See Engine.kill."""
        if not self._ended:
            self._killed = True
            self._keepers.kill(self.instance_id)
        if self._core is not None:
            self._core.kill()

    async def end(self, timeout_s: float) -> None:
        """See EngineCoreLife; an engine that goes on is let go of."""
        if self._ended:
            return
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        goes_on = self._goes_on()
        if self._core is not None:
            await self._core.end(timeout_s)
        if not goes_on:
            await self._keepers.stop(self.instance_id, timeout_s)
        self._ended = True

    def _goes_on(self) -> bool:
        if self._killed:
            return False
        is_attached = self._core is not None and self._core.pid is not None
        match self._phase():
            case Phase.STARTS:
                return self._was_found
            case Phase.SERVES:
                return self._core is not None and not is_attached and self._keepers.lives(self.instance_id)
            case Phase.ENDS:
                return is_attached or self._was_found


class KeptSource:
    """
    Makes the engines of a fleet. See `cascadeinfer.engines.source.EngineSource`.

    Attributes:
        phase: What the server does.
        build: See EngineSource.
        first_builds: See EngineSource; those of engines that an unfinished update has left.
    """

    def __init__(
        self,
        keepers: Keepers,
        found: Sequence[InstanceId],
        builds: KeptBuilds,
        key: str,
        environment: Mapping[str, str],
    ) -> None:
        """
        Args:
            keepers: Of the fleet.
            found: Instances whose engines live.
            builds: What engines are started with; those that live are of the first, but for `first_builds`.
            key: The fleet's, as text.
            environment: More variables for those that are started.
        """
        self.phase = Phase.STARTS
        self.build = FIRST_BUILD
        self._keepers = keepers
        self._found = frozenset(found)
        self._builds = builds
        self._key = key
        self._environment = dict(environment)
        self.first_builds: Mapping[InstanceId, Build] = {}
        self._n_placed = 0
        self._lives: dict[InstanceId, KeptCore] = {}

    @property
    def own_builds(self) -> Mapping[InstanceId, Build]:
        """See EngineSource; engines of a fleet have none."""
        return {}

    def prepare(self, options: Sequence[str]) -> Build:
        """See EngineSource."""
        served = min(core.vllm_config.model_config.max_model_len for core in self._lives.values())
        return self._builds.prepare(self.build, options, served)

    async def note(self, builds: Collection[Build]) -> None:
        """See EngineSource."""
        await self._builds.note(self.build, builds)

    async def check(self, build: Build) -> None:
        """See EngineSource."""
        await self._builds.check(build)

    async def has_room(self, *, shared: bool) -> bool:
        """See EngineSource."""
        return await self._builds.has_room(shared)

    def place(self, instance_id: InstanceId, build: Build | None = None) -> Callable[[int], VllmInstance]:
        """See EngineSource."""
        build = build or self.first_builds.get(instance_id, self.build)
        self._keepers.place(instance_id)
        index = int(instance_id) if instance_id.isdecimal() else self._n_placed
        self._n_placed += 1
        content = dataclasses.replace(self._builds.content_of(build), instance_id=instance_id)
        terms = self._builds.terms_of(build)
        order = EngineOrder(MODULE, content.packed(), self._key, self._environment)

        def make(start: int) -> VllmInstance:
            core = self._lives[instance_id] = KeptCore(
                instance_id,
                index,
                self._keepers,
                order,
                terms,
                was_found=start == 0 and instance_id in self._found,
                phase=lambda: self.phase,
            )
            return VllmInstance(core)

        return make

    def release(self, instance_id: InstanceId) -> None:
        """See EngineSource."""
        self._found -= {instance_id}
        self._lives.pop(instance_id, None)
        self._keepers.kill(instance_id)  # one whose connection was lost goes on until here
        self._keepers.release(instance_id)
