"""
An EngineCore that somebody else has started, perhaps on another machine, and that stands on its own.

It lets front ends attach (`connector/door.py`); when one leaves, its requests there are aborted, and the engine goes on
for the others. Its own HTTP server, if it has one, works beside them. So nothing is started, restarted or killed here:
an instance whose connection is lost counts as dead and is attached to again when it answers.
"""

import asyncio
import copy
import dataclasses
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import zmq
from vllm.config import VllmConfig
from vllm.v1.engine.exceptions import EngineDeadError

from cascadeinfer.cluster.addresses import EngineAddress
from cascadeinfer.cluster.knocking import (
    PROTOCOL,
    About,
    AskAbout,
    AskToAttach,
    Attached,
    KeyRefusedError,
    KnockError,
    knock,
)
from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.attached import AttachedClient, leave
from cascadeinfer.engines.vllm.attachment import StandingAttachment
from cascadeinfer.engines.vllm.channel import EngineChannel, connect_both_ways
from cascadeinfer.engines.vllm.client_sockets import ClientSockets
from cascadeinfer.engines.vllm.connector.identity import model_sizes
from cascadeinfer.engines.vllm.ending import fail_pending_calls
from cascadeinfer.engines.vllm.instance import VllmInstance

logger = logging.getLogger(__name__)

KNOCK_TIMEOUT_S: Final = 10.0
"""A listener answers between two steps of its engine."""


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """
    What a front end expects of every engine it attaches to.

    Attributes:
        config: Its own configuration, of the model that it serves.
        key: The cluster's.
        lease_s: How long engines keep the blocks of a request that moves away, at least.
        max_migrations: An engine takes part in at once.
        own_host: The address on which engines reach this process; None: the one by which the engine is reached.
        trusts_model: Another process of the server has held the engine's model against its own configuration already,
            which since a rolling update may have another data type or quantisation than this process's.
    """

    config: VllmConfig
    key: ClusterKey
    lease_s: int
    max_migrations: int
    own_host: str | None = None
    trusts_model: bool = False


class StandingCore:
    """See the module header, and `cascadeinfer.engines.vllm.instance.EngineCoreLife`."""

    def __init__(
        self,
        instance_id: InstanceId,
        index: int,
        address: EngineAddress,
        terms: Terms,
        before_down: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """
        Args:
            instance_id: Its name here.
            index: Its number here.
            address: Where it listens.
            terms: What is expected of it.
            before_down: Awaited once its connection is lost, before it counts as dead.
        """
        self.instance_id = instance_id
        self.index = index
        self.vllm_config = copy.deepcopy(terms.config)
        self._address = address
        self._terms = terms
        self._before_down = before_down
        self._pid: int | None = None
        self._sockets: ClientSockets | None = None
        self._client: AttachedClient | None = None
        self._channel: EngineChannel | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the EngineCore, on its machine."""
        return self._pid

    async def begin(self) -> EngineChannel:
        """Attach to it."""
        try:
            return await self._attach()
        except KnockError as error:
            raise EngineError(str(error), instance_id=self.instance_id) from error
        except (EngineDeadError, TimeoutError, zmq.ZMQError, OSError) as error:
            raise EngineError(f"{self._address} cannot be attached: {error}", instance_id=self.instance_id) from error

    async def _attach(self) -> EngineChannel:
        terms, address = self._terms, self._address
        own_host = terms.own_host or host_towards(address)
        sockets = self._sockets = ClientSockets.on(own_host, terms.key)
        question = AskToAttach(PROTOCOL, *sockets.addresses)
        attached = await knock(address.host, address.port, terms.key, question, KNOCK_TIMEOUT_S)
        assert isinstance(attached, Attached), attached
        check_lease(attached.about, address, terms.lease_s)
        client = self._client = AttachedClient(self.vllm_config, sockets, attached.ready_payload, attached.client)
        hello = await client.connected()
        self._watch = asyncio.get_running_loop().create_task(self._until_disconnected(sockets, client))
        channel = self._channel = EngineChannel(self.instance_id, self.index, client, hello, attached.connector_token)
        await channel.limit_migrations(terms.max_migrations)
        if not terms.trusts_model:
            check_model(terms.config, (await channel.identity()).engine, address)
        self._pid = attached.about.pid
        logger.info(
            "instance %s is the engine at %s (%s, pid %s)", self.instance_id, address, attached.about.node, self._pid
        )
        return channel

    async def _until_disconnected(self, sockets: ClientSockets, client: AttachedClient) -> None:
        """Notice its death. Connections of strangers, who do not have the key, end as well."""
        await sockets.until_gone(client.is_connected)
        if self._before_down is not None:
            await self._before_down()
        self.kill()

    async def attachment(self, client: int) -> StandingAttachment | None:  # noqa: ARG002 - it gives numbers by itself
        """What a follower of this process must know of it; None while it is not attached."""
        if self._pid is None or self._channel is None:
            return None
        terms, engine_id = self._terms, self._channel.hello.engine_id
        return StandingAttachment(
            self.index,
            engine_id,
            self._address.host,
            self._address.port,
            terms.key,
            terms.lease_s,
            terms.max_migrations,
            terms.own_host,
        )

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Handshake with each peer, both ways, and wait until all are done."""
        await connect_both_ways(channel, peers)

    async def forget(self, channel: EngineChannel, client: int) -> None:
        """Nothing to do: it notices by itself which clients are gone."""

    def kill(self) -> None:
        """It is not ours to kill: it is left, and what this process has there is aborted."""
        self._pid = None
        if self._client is not None:
            self._client.engine_died()
            fail_pending_calls(self._client)

    async def end(self, timeout_s: float) -> None:  # noqa: ARG002 - the protocol's
        """Leave it."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
        sockets, self._sockets = self._sockets, None
        client, self._client = self._client, None
        if sockets is not None:
            await asyncio.to_thread(sockets.accept_nobody)
            if client is None:
                sockets.close()
        if client is not None:
            leave(client)


def maker_of(address: EngineAddress, terms: Terms) -> Callable[[InstanceId, int], Callable[[int], VllmInstance]]:
    """What makes, for an instance of this name and number, its engine for the n-th start."""
    return lambda instance_id, index: lambda _: VllmInstance(StandingCore(instance_id, index, address, terms))


async def look_at(address: EngineAddress, key: ClusterKey) -> About | None:
    """
    What runs at an address; None if nobody answers.

    Raises:
        KeyRefusedError: Whoever listens there does not have this key.
    """
    try:
        about = await knock(address.host, address.port, key, AskAbout(PROTOCOL), KNOCK_TIMEOUT_S)
    except KeyRefusedError:
        raise
    except KnockError as error:
        logger.debug("%s", error)
        return None
    assert isinstance(about, About), about
    return about


def host_towards(address: EngineAddress) -> str:
    """The address of this machine from which that one is reached. Raises OSError if none."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address.host, address.port))  # sends nothing
        return str(probe.getsockname()[0])


def check_lease(about: About, address: EngineAddress, lease_s: int) -> None:
    """Raises KnockError if an engine gives up the blocks of a moving request earlier than this server counts on."""
    if about.lease_s < lease_s:
        raise KnockError(
            f"the engine at {address} keeps a moving request's KV cache for {about.lease_s} s, "
            f"this server counts on {lease_s} s (kv_lease_duration there, --kv-lease-s here)"
        )


def check_model(config: VllmConfig, engine: Any, address: EngineAddress) -> None:
    """
    Compare the model of an engine with the one that this front end was started for.

    Raises:
        KnockError: They differ; the message says in what.
    """
    ours: Mapping[str, Any] = model_sizes(config.model_config)
    differences = [
        f"{name} {getattr(engine, name)} instead of {value}"
        for name, value in ours.items()
        if getattr(engine, name) != value
    ]
    if differences:
        raise KnockError(f"the engine at {address} runs another model: {', '.join(differences)}")
