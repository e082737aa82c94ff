"""
A Ray cluster as a fleet sees it: its nodes, its places, and the actors that keep engines.

Only `ray_side.py` uses this module, in a process of its own. What blocks in Ray runs in a thread.

    fleet:NAME          detached actor: what the fleet's servers share (`ray_actors.Facts`)
    user:NAME           actor of the server that uses the fleet: its name is the lock, and Ray ends it with its driver
    engine:NAME:ID      detached actor, and a placement group of the same name: an engine and its place
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import ray
import ray.exceptions
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cascadeinfer.cluster.addresses import host_and_port
from cascadeinfer.cluster.keeping import TOLD
from cascadeinfer.cluster.ray_actors import Facts, KeeperActor, User
from cascadeinfer.cluster.ray_messages import ADDRESS_OPTION, Need
from cascadeinfer.cluster.ray_nodes import (
    NODE_TIMEOUT_S,
    Node,
    bundle_of,
    first_sentence,
    free_words,
    in_words,
    n_fitting,
    nodes_now,
)
from cascadeinfer.core.errors import ConfigError, EngineError
from cascadeinfer.core.types import InstanceId

logger = logging.getLogger(__name__)

NAMESPACE: Final = "cascadeinfer"
REACH_TIMEOUT_S: Final = 10.0
PLACE_TIMEOUT_S: Final = 60.0
"""For Ray to find a place where there is room, or for an autoscaler to make some."""
ALREADY_REMOVED: Final = (ValueError, ray.exceptions.RayError)
REFUSAL: Final = "InvalidAuthToken"
STDERR: Final = 2


class Engine(NamedTuple):
    """The actor of an engine and its node's address."""

    actor: Any
    address: str


def connect(address: str | None, host: str | None, refuse: Callable[[str], None]) -> None:
    """
    Connect this process to a cluster.

    Args:
        address: HOST:PORT of its head; None: the one of this machine.
        host: This machine's address in it; None: Ray finds it out.
        refuse: Called from a thread when the cluster does not accept the token: Ray itself would go on trying.

    Raises:
        ConfigError: It cannot be reached, or refuses.
    """
    if address is not None:
        name, port = host_and_port(address, ADDRESS_OPTION)
        try:
            socket.create_connection((name, port), REACH_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}: {error.strerror or error}",
                option=ADDRESS_OPTION,
                fix="cascadeinfer cluster up starts one on this machine",
            ) from error
    over = threading.Event()
    threading.Thread(target=_watch_token, args=(refuse, over), daemon=True).start()
    own = {} if host is None else {"_node_ip_address": host}
    try:
        ray.init(
            address=address or "auto",
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"Ray at {address or 'this machine'} cannot be used: {first_sentence(error)}",
            option=ADDRESS_OPTION,
            fix="this machine must run a node of the cluster: ray start --address=...",
        ) from error
    finally:
        over.set()


def _watch_token(refuse: Callable[[str], None], over: threading.Event) -> None:
    """Read what Ray's own libraries write to standard error, which is a file."""
    with contextlib.suppress(OSError):  # it is no file: somebody watches it
        while not over.wait(0.2):
            if REFUSAL in os.pread(STDERR, 1 << 16, 0).decode(errors="replace"):
                refuse("the cluster asks for another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH")
                return


class RayCluster:
    """See the module header; connected already."""

    def __init__(self) -> None:
        """No fleet yet."""
        self._fleet = ""
        self._facts: Any = None
        #: Its record and key, as far as this process has heard of them.
        self._known: tuple[str | None, str | None] = (None, None)
        self._user: Any = None
        self._engines: dict[InstanceId, Engine] = {}
        self._placing = asyncio.Lock()

    # --- the fleet ---------------------------------------------------------------------------------------------------

    async def take(self, fleet: str, who: str, *, asks_to_end: bool, must_exist: bool) -> str | None:
        """Use a fleet; returns who uses it already, or None. Raises ConfigError if it must exist and does not."""
        if self._fleet == fleet:
            return None
        names = await asyncio.to_thread(ray.util.list_named_actors)
        if (
            must_exist
            and f"fleet:{fleet}" not in names
            and not any(name.startswith(f"engine:{fleet}:") for name in names)
        ):
            there = [name.removeprefix("fleet:") for name in sorted(names) if name.startswith("fleet:")]
            raise ConfigError(
                f"there is no fleet {fleet} on this cluster",
                option="NAME",
                fix=f"there are: {', '.join(there)}" if there else "there is none",
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": f"user:{fleet}", "num_cpus": 0, "scheduling_strategy": here, "max_restarts": 0}
        try:
            user = await asyncio.to_thread(lambda: ray.remote(User).options(**options).remote(who))
        except ray.exceptions.ActorAlreadyExistsError:
            return await self._other_user(fleet, asks_to_end=asks_to_end)
        self._user = user
        try:
            await user.who.remote()
        except ray.exceptions.RayError as error:
            raise ConfigError(f"Ray starts no process on this node: {first_sentence(error)}") from error
        self._fleet = fleet
        return None

    @staticmethod
    async def _other_user(fleet: str, *, asks_to_end: bool) -> str:
        with contextlib.suppress(*ALREADY_REMOVED):  # it has just gone
            other = await asyncio.to_thread(ray.get_actor, f"user:{fleet}")
            if asks_to_end:
                await other.ask_to_end.remote()
            return str(await other.who.remote())
        return "?"

    async def until_asked_to_end(self) -> None:
        """Wait until somebody stops the fleet."""
        await self._user.until_asked.remote()

    async def record(self) -> str | None:
        """What the fleet's engines are started with; None: nothing yet."""
        record: str | None = await self._of_facts(lambda facts: facts.record.remote())
        self._known = record, self._known[1]
        return record

    async def write(self, record: str) -> None:
        """They are started with this from now on."""
        self._known = record, self._known[1]
        await self._of_facts(lambda facts: facts.write.remote(record))

    async def key(self) -> str:
        """The fleet's key."""
        key: str = await self._of_facts(lambda facts: facts.key.remote())
        self._known = self._known[0], key
        return key

    async def _of_facts(self, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """Ask the actor of what the fleet's servers share; one whose node or process has died is made again."""
        facts = await self._found_facts()
        try:
            return await ask(facts)
        except ray.exceptions.ActorDiedError:
            self._facts = None
        logger.warning("the actor of the fleet's record is gone: it is made again from what is known")
        return await ask(await self._found_facts())

    async def _found_facts(self) -> Any:
        if self._facts is None:
            name = f"fleet:{self._fleet}"
            try:
                self._facts = await asyncio.to_thread(ray.get_actor, name)
            except ValueError:
                known = self._known if self._known[1] is not None else await self._known_of_engines()
                options = {"name": name, "lifetime": "detached", "num_cpus": 0, "max_restarts": 0}
                self._facts = await asyncio.to_thread(lambda: ray.remote(Facts).options(**options).remote(*known))
        return self._facts

    async def _known_of_engines(self) -> tuple[str | None, str | None]:
        for engine in self._engines.values():
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                known = await asyncio.wait_for(engine.actor.facts.remote(), NODE_TIMEOUT_S)
                if known is not None:
                    return known[0], known[1]
        return None, None

    async def forget(self) -> None:
        """The fleet has no engines any more."""
        facts = await self._found_facts()
        await asyncio.to_thread(ray.kill, facts)
        self._facts, self._known = None, (None, None)

    # --- engines -----------------------------------------------------------------------------------------------------

    async def find(self) -> list[InstanceId]:
        """The engines that live; the places of dead ones are freed."""
        names = await asyncio.to_thread(ray.util.list_named_actors)
        prefix = f"engine:{self._fleet}:"
        for name in [name for name in names if name.startswith(prefix)]:
            instance_id = name.removeprefix(prefix)
            try:
                actor = await asyncio.to_thread(ray.get_actor, name)
                _, told, _ = await asyncio.wait_for(actor.follow.remote(0), NODE_TIMEOUT_S)
                is_started = await actor.facts.remote() is not None
            except (*ALREADY_REMOVED, TimeoutError):
                continue
            if not is_started or TOLD.decode(told).state == "ended":  # its server was killed before it could say more
                await self._kill_actor(actor)
            else:
                self._engines[instance_id] = Engine(actor, await asyncio.to_thread(self._address_of, name))
        for name in await asyncio.to_thread(_group_names):
            if name.startswith(prefix) and name.removeprefix(prefix) not in self._engines:
                await self._free(name)
        return sorted(self._engines)

    def _address_of(self, name: str) -> str:
        nodes = {node.node_id: node.address for node in nodes_now()}
        for group in placement_group_table().values():
            if group["name"] == name and group["state"] == "CREATED":
                return nodes.get(group["bundles_to_node_id"][0], "?")
        return "?"

    def engine(self, instance_id: InstanceId) -> Engine | None:
        """One that has been found or started."""
        return self._engines.get(instance_id)

    async def start(
        self, instance_id: InstanceId, need: Need, order: tuple[str, bytes, str, dict[str, str]], version: str
    ) -> None:
        """
        Place an instance and start its engine.

        Raises:
            EngineError: There is no room, or the node refuses.
        """
        name = f"engine:{self._fleet}:{instance_id}"
        await self._free(name)
        bundle = await asyncio.to_thread(bundle_of, need)
        record = await self.record()
        async with self._placing:
            group, node = await asyncio.to_thread(self._placed, name, bundle, instance_id)
        try:
            options: dict[str, Any] = {
                "name": name,
                "lifetime": "detached",
                "max_restarts": 0,
                "num_cpus": bundle.get("CPU", 0),
                "num_gpus": bundle.get("GPU", 0),
                "resources": {key: value for key, value in bundle.items() if key not in {"CPU", "GPU"}},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            }
            n_cores = 0 if bundle.get("GPU") else need.cpus
            actor = await asyncio.to_thread(
                lambda: ray.remote(KeeperActor).options(**options).remote(self._fleet, instance_id, free_own_place)
            )
            self._engines[instance_id] = Engine(actor, node.address)
            refusal = await actor.start.remote(node.address, order, n_cores, version, record)
        except ray.exceptions.RayError as error:
            refusal = f"no keeper on {node.address}: {first_sentence(error)}"
        if refusal is not None:
            await self.end(instance_id, 0.0)
            raise EngineError(refusal, instance_id=instance_id)

    def _placed(self, name: str, bundle: dict[str, float], instance_id: InstanceId) -> tuple[PlacementGroup, Node]:
        """Find a place, on the node with the fewest of this fleet's engines that has room."""
        nodes = nodes_now()
        used = Counter(engine.address for other, engine in self._engines.items() if other != instance_id)
        fitting = [node for node in nodes if n_fitting(node.free, bundle)]
        wanted = min(fitting, key=lambda node: (used[node.address], -n_fitting(node.free, bundle)), default=None)
        # The target is a wish: Ray takes another node if that one has filled up or died.
        group = placement_group(
            [bundle],
            strategy="STRICT_PACK",
            name=name,
            lifetime="detached",
            _soft_target_node_id=None if wanted is None else wanted.node_id,
        )
        if not group.wait(PLACE_TIMEOUT_S):
            remove_placement_group(group)
            raise EngineError(
                f"no node has room: {in_words(bundle)} needed, {free_words(nodes, bundle)}", instance_id=instance_id
            )
        node_id = placement_group_table(group)["bundles_to_node_id"][0]
        return group, next(node for node in nodes_now() if node.node_id == node_id)

    async def end(self, instance_id: InstanceId, timeout_s: float) -> None:
        """End an engine and free its place. Idempotent."""
        engine = self._engines.pop(instance_id, None)
        if engine is not None:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                # The node may be out of reach; its engine then ends with its raylet.
                await asyncio.wait_for(engine.actor.stop.remote(timeout_s), timeout_s + REACH_TIMEOUT_S)
            await self._kill_actor(engine.actor)
        await self._free(f"engine:{self._fleet}:{instance_id}")

    @staticmethod
    async def _kill_actor(actor: Any) -> None:
        with contextlib.suppress(*ALREADY_REMOVED):
            await asyncio.to_thread(ray.kill, actor)

    @staticmethod
    async def _free(name: str) -> None:
        """Remove the placement groups of this name."""

        def remove() -> None:
            for group_id, group in placement_group_table().items():
                if group["name"] == name and group["state"] != "REMOVED":
                    with contextlib.suppress(*ALREADY_REMOVED):
                        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))

        await asyncio.to_thread(remove)


def _group_names() -> list[str]:
    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def free_own_place() -> None:
    """In an actor: remove its placement group, which ends it."""
    if (group := ray.util.get_current_placement_group()) is not None:
        remove_placement_group(group)
