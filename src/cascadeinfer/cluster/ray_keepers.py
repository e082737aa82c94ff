"""
Keepers of engines on the nodes of a Ray cluster, and what a fleet's servers share there.

Ray itself is spoken to by a process of its own (`ray_link.py`, `ray_side.py`).
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import msgspec

from cascadeinfer import __version__
from cascadeinfer.cluster.addresses import EngineAddress, host_and_port
from cascadeinfer.cluster.fleet import OPTION, Record, check_name
from cascadeinfer.cluster.keeping import DOOR, EngineOrder, Told
from cascadeinfer.cluster.process_start import operator_environment
from cascadeinfer.cluster.ray_link import RayLink, Side, SideLostError, SideProcess
from cascadeinfer.cluster.ray_messages import (
    Check,
    Connect,
    Find,
    Forget,
    Heard,
    KillOne,
    Need,
    ReadKey,
    ReadRecord,
    Start,
    StopOne,
    Take,
    WriteRecord,
)
from cascadeinfer.core.errors import ConfigError, EngineError
from cascadeinfer.core.types import InstanceId

logger = logging.getLogger(__name__)

TAKE_POLL_S: Final = 0.2
GONE: Final = Told("ended", None, None, "its keeper is gone")
TRAVELS: Final = ("VLLM_", "HF_", "TRANSFORMERS_", "NCCL_", "UCX_", "TORCH_")
"""Variables of the server that engines on other machines get, by how their names begin; others are their node's."""
STAYS: Final = frozenset(
    {
        "VLLM_API_KEY",
        "VLLM_HOST_IP",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_PORT",
        "VLLM_RPC_BASE_PATH",
        "UCX_NET_DEVICES",
        "NCCL_SOCKET_IFNAME",
        "VLLM_CPU_OMP_THREADS_BIND",
    }
)
"""Of those, the ones that are facts of one machine, or secrets of the server."""


@dataclasses.dataclass(frozen=True, slots=True)
class RayTerms:
    """
    Where a server's Ray cluster is and what its instances take there.

    Attributes:
        address: HOST:PORT of its head; None: the one of this machine.
        host: This machine's address in the cluster; None: Ray finds it out.
        need: Of each instance.
    """

    address: str | None = None
    host: str | None = None
    need: Need = Need(1, None, 1)  # noqa: RUF009 - frozen


class _State:
    """What is known of one engine."""

    def __init__(self) -> None:
        self.heard = Heard("", Told("starting"))
        self.changed = asyncio.Condition()

    async def become(self, heard: Heard) -> None:
        """Something is told of it."""
        async with self.changed:
            self.heard = heard
            self.changed.notify_all()

    async def until(self, is_so: Callable[[Told], bool]) -> Told:
        """Wait until something is told of it."""
        async with self.changed:
            await self.changed.wait_for(lambda: is_so(self.heard.told))
        return self.heard.told


class RayKeepers:
    """See `cascadeinfer.cluster.keeping.Keepers`."""

    def __init__(self, link: RayLink, need: Need) -> None:
        """
        Args:
            link: Open, with a fleet that is taken.
            need: Of each instance.
        """
        self._link = link
        self._need = need
        self._states: dict[InstanceId, _State] = {}
        self._telling: set[asyncio.Task[None]] = set()
        #: The last that was told of engines that are none of ours so far.
        self._unclaimed: dict[InstanceId, Heard] = {}
        #: To be ended as soon as Ray can be reached again.
        self._left_over: dict[InstanceId, float] = {}
        link.heard = self._on_heard
        link.came_back = self._come_back

    def _on_heard(self, heard: Heard) -> None:
        if (state := self._states.get(heard.instance_id)) is not None:
            self._tell(state, heard)
        else:
            self._unclaimed[heard.instance_id] = heard  # it may come together with the answer that names the engine

    def _tell(self, state: _State, heard: Heard) -> None:
        task = asyncio.ensure_future(state.become(heard))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def find(self) -> list[InstanceId]:
        """See Keepers."""
        self._unclaimed.clear()
        found = await self._link.ask(Find())
        assert isinstance(found, list)
        for instance_id in found:
            state = self._states.setdefault(instance_id, _State())
            if (heard := self._unclaimed.pop(instance_id, None)) is not None:
                self._tell(state, heard)
        self._unclaimed.clear()
        return found

    async def _come_back(self) -> None:
        """Ray can be reached again: learn what has happened meanwhile, and do what was left."""
        found = await self._link.ask(Find())
        assert isinstance(found, list)
        for instance_id, state in self._states.items():
            if instance_id not in found and state.heard.told.state != "ended":
                self._tell(state, Heard(instance_id, GONE))
        for instance_id, timeout_s in list(self._left_over.items()):
            await self._link.ask(StopOne(instance_id, timeout_s), instance_id)
            del self._left_over[instance_id]

    def lives(self, instance_id: InstanceId) -> bool:
        """See Keepers."""
        state = self._states.get(instance_id)
        return state is not None and state.heard.told.state != "ended"

    def place(self, instance_id: InstanceId) -> None:
        """See Keepers; Ray places an instance when it is started, and `check` has looked for room at the start."""

    def release(self, instance_id: InstanceId) -> None:
        """See Keepers; `stop` has freed it."""

    async def check(self, n_instances: int, model: str) -> list[str]:
        """
        Look whether the cluster has room for more instances and its nodes are fit for them.

        Args:
            n_instances: So many more than live.
            model: A path, which must exist on the nodes, or a name on a hub.

        Returns:
            Lines for the operator.

        Raises:
            ConfigError: There is no room, or a node is not fit.
        """
        path = model if model.startswith(("/", ".", "~")) else None
        lines = await self._link.ask(Check(n_instances, self._need, path, __version__))
        assert isinstance(lines, list)
        return lines

    async def start(self, instance_id: InstanceId, order: EngineOrder) -> None:
        """See Keepers."""
        if self.lives(instance_id):
            raise EngineError("is kept already", instance_id=instance_id)
        if instance_id in self._states:
            await self.stop(instance_id, 0.0)  # what a dead one has left
        if instance_id in self._left_over:
            raise EngineError("Ray cannot be reached to end its last start", instance_id=instance_id)
        self._states[instance_id] = _State()
        environment = {**travelling(operator_environment()), **order.environment}
        question = Start(instance_id, self._need, order.module, order.content, order.key, environment, __version__)
        try:
            await self._link.ask_of(question, instance_id)
        except BaseException:
            self._states.pop(instance_id, None)
            raise

    async def ready(self, instance_id: InstanceId) -> EngineAddress:
        """See Keepers."""
        told = await self._state(instance_id).until(lambda told: told.state != "starting")
        if told.door is None:
            raise EngineError(told.why or "has ended", instance_id=instance_id)
        return EngineAddress(*host_and_port(told.door, DOOR))

    async def ended(self, instance_id: InstanceId) -> str:
        """See Keepers."""
        told = await self._state(instance_id).until(lambda told: told.state == "ended")
        return told.why or ""

    def _state(self, instance_id: InstanceId) -> _State:
        if (state := self._states.get(instance_id)) is None:
            raise EngineError("has no keeper", instance_id=instance_id)
        return state

    def kill(self, instance_id: InstanceId) -> None:
        """See Keepers."""
        self._link.tell(KillOne(instance_id))

    async def stop(self, instance_id: InstanceId, timeout_s: float) -> None:
        """See Keepers; while Ray cannot be reached, it is done later."""
        try:
            await self._link.ask(StopOne(instance_id, timeout_s), instance_id)
        except SideLostError:
            self._left_over[instance_id] = timeout_s
            logger.warning("instance %s is ended as soon as Ray can be reached again", instance_id)
        state = self._states.pop(instance_id, None)
        if state is not None and state.heard.told.state != "ended":
            await state.become(Heard(instance_id, Told("ended", None, None, "it was stopped")))

    def stage(self, instance_id: InstanceId) -> str | None:
        """See Keepers."""
        if (state := self._states.get(instance_id)) is None:
            return "waiting for its place"
        where = f" on {state.heard.node}" if state.heard.node else ""
        return f"{state.heard.stage}{where}" if state.heard.stage else "waiting for its place"

    async def leave(self) -> None:
        """See Keepers; the connection is the fleet's to close."""


class RayFleet:
    """
    A fleet on a Ray cluster, used by this process. See `cascadeinfer.cluster.fleets.UsedFleet`.

    Attributes:
        name: Its name.
    """

    logs: Final = "on each engine's node, in TMPDIR/cascadeinfer-nodes-UID"
    is_here: Final = False

    def __init__(self, name: str, link: RayLink, need: Need) -> None:
        """
        Args:
            name: See RayFleet.
            link: Open; the fleet is taken.
            need: Of each instance.
        """
        self.name = name
        self._link = link
        self._keepers = RayKeepers(link, need)

    @property
    def stop_command(self) -> str:
        """What ends the fleet."""
        return f"cascadeinfer stop {self.name} --cluster ray"

    @classmethod
    @contextlib.asynccontextmanager
    async def used(
        cls,
        name: str,
        terms: RayTerms,
        *,
        wait: bool = False,
        ends_others: bool = False,
        must_exist: bool = False,
        timeout_s: float = 0.0,
        asked_to_end: Callable[[], None] = lambda: None,
        side: Side | None = None,
    ) -> AsyncIterator["RayFleet"]:
        """
        In this context, this process uses a fleet.

        Args:
            name: Its name.
            terms: Where the cluster is.
            wait: Until no other server uses it.
            ends_others: Ask the server that uses it to end, and wait for that.
            must_exist: Do not begin a fleet.
            timeout_s: With `ends_others`: for so long.
            asked_to_end: Called when somebody stops the fleet.
            side: Speaks with Ray; by default a process of its own.

        Raises:
            ConfigError: The cluster cannot be reached, another server uses the fleet, or there is none.
        """
        check_name(name)
        link = RayLink(side or SideProcess(), [Connect(terms.address, terms.host)])
        link.asked_to_end = asked_to_end
        await link.open()
        try:
            loop = asyncio.get_running_loop()
            deadline_s = loop.time() + timeout_s
            me = f"process {os.getpid()}"
            take = Take(name, me, ends_others, must_exist)
            waits_for: object = None
            while (user := await link.ask(take)) is not None:
                if not wait and (not ends_others or loop.time() > deadline_s):
                    raise ConfigError(
                        f"the server on {user} uses {name} already",
                        option=OPTION,
                        fix="stop that one, name another fleet, or add --standby to wait for its end",
                    )
                if wait and user != waits_for:
                    logger.info("standing by: this server waits for the end of the one on %s", user)
                    waits_for = user
                await asyncio.sleep(TAKE_POLL_S)
            link.greet_with(Take(name, me))
            yield cls(name, link, terms.need)
        finally:
            await link.close()

    def keepers(self, places: object = None) -> RayKeepers:  # noqa: ARG002 - the protocol's
        """See UsedFleet; Ray knows the places."""
        return self._keepers

    async def check(self, n_instances: int, model: str) -> list[str]:
        """See UsedFleet."""
        return await self._keepers.check(n_instances, model)

    async def record(self) -> Record | None:
        """See UsedFleet."""
        told = await self._link.ask(ReadRecord())
        if told is None:
            return None
        assert isinstance(told, str)
        try:
            return msgspec.json.decode(told, type=Record)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"the record of {self.name} cannot be read: {error}", option=OPTION, fix=self.stop_command
            ) from error

    async def write(self, record: Record) -> None:
        """See UsedFleet."""
        await self._link.ask(WriteRecord(msgspec.json.encode(record).decode()))

    async def key(self) -> str:
        """See UsedFleet."""
        key = await self._link.ask(ReadKey())
        assert isinstance(key, str)
        return key

    async def remove(self) -> None:
        """See UsedFleet."""
        await self._link.ask(Forget())


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a server that its engines on other machines get."""
    return {name: value for name, value in environment.items() if name.startswith(TRAVELS) and name not in STAYS}
