"""What a further front-end process must know of an instance, from the process that has started or found it."""

from typing import Protocol, TypeAlias, runtime_checkable

import msgspec

from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.engines.vllm.instance import VllmInstance


class Attachment(msgspec.Struct, frozen=True, tag=True):
    """
    What a further client must know of a running instance; sent by the owner.

    Attributes:
        index: Its number; vLLM's metrics carry it as the label `engine`.
        engine_id: A new one for each start.
        ready_payload: vLLM's ready message.
        input_address: Where this client binds the socket from which the instance takes requests.
        output_address: Where it binds the socket to which the instance sends.
        connector_token: Authenticates front ends' words to the instance's connector; must not be logged.
    """

    index: int
    pid: int | None
    engine_id: str
    ready_payload: bytes
    input_address: str
    output_address: str
    connector_token: str

    def __repr__(self) -> str:
        """Without the token."""
        return f"Attachment(index={self.index}, pid={self.pid}, engine_id={self.engine_id!r})"


class StandingAttachment(msgspec.Struct, frozen=True, tag=True):
    """
    Where a further client knocks at an instance that stands on its own, and what is expected of it (`standing.Terms`).

    Attributes:
        index: Its number; vLLM's metrics carry it as the label `engine`.
        engine_id: A new one for each start.
        host, port: Where it listens.
        key: The cluster's; its secret half must not be logged.
        lease_s: How long it keeps the blocks of a request that moves away, at least.
        max_migrations: It takes part in at once.
        own_host: The address on which it reaches front ends; None: the one by which it is reached.
    """

    index: int
    engine_id: str
    host: str
    port: int
    key: ClusterKey
    lease_s: int
    max_migrations: int
    own_host: str | None


AnyAttachment: TypeAlias = Attachment | StandingAttachment


@runtime_checkable
class Attachable(Protocol):
    """The life of an EngineCore that further front-end processes of this server can use."""

    async def attachment(self, client: int) -> AnyAttachment | None:
        """What the further client with this number must know; None while it does not run."""
        ...


async def attachment_of(engine: Engine, client: int) -> AnyAttachment | None:
    """Have an instance of this process serve the further client of this number; what that one must know, None while it
    does not run.
    """
    assert isinstance(engine, VllmInstance)
    assert isinstance(engine.life, Attachable)
    return await engine.life.attachment(client)
