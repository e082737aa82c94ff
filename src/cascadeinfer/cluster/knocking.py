"""
How a front end reaches an engine that somebody else has started: the questions and answers at the engine's listener.

The listener's socket is a ZMQ ROUTER under the cluster's key (`shared_key.py`), a question and its answer one frame of
msgpack each. An engine that is loading does not listen yet.
"""

import asyncio
from typing import Any, Final, TypeAlias

import msgspec
import zmq
import zmq.asyncio

from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.core.errors import CascadeError
from cascadeinfer.engines.patience import within

PROTOCOL: Final = 2
"""Raised when a question or an answer changes its meaning, or a command that a front end gives once it is attached."""
MAX_ANSWER_BYTES: Final = 1 << 20
HEARTBEAT_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 10_000
"""A connection without a sign of life for this long is closed, and the other side counts as dead. ZMQ's own threads
send and answer the heartbeats, so a busy process does not miss one."""


class AskAbout(msgspec.Struct, frozen=True, tag=True):
    """What runs there?"""

    protocol: int


class AskToAttach(msgspec.Struct, frozen=True, tag=True):
    """
    Serve me.

    Attributes:
        input_address: The socket on which the asker sends requests; it has bound it.
        output_address: The socket on which it takes outputs; likewise.
    """

    protocol: int
    input_address: str
    output_address: str


class About(msgspec.Struct, frozen=True, tag=True):
    """
    What runs there.

    Attributes:
        engine_id: A new one for each start.
        node: Name of the machine.
        pid: Of the engine there.
        version: Of our connector in it.
        lease_s: How long it keeps the blocks of a request that moves away.
        mark: The same for engines with the same options; empty if whoever started it has not said so.
    """

    engine_id: str
    node: str
    pid: int
    version: str
    lease_s: int
    mark: str = ""


class Attached(msgspec.Struct, frozen=True, tag=True):
    """
    The engine connects to the asker's sockets and serves it until that connection is lost.

    Attributes:
        about: What runs there.
        client: The asker's number there.
        ready_payload: VLLM's ready message.
        connector_token: Authenticates front ends' words to the engine's connector; must not be logged.
    """

    about: About
    client: int
    ready_payload: bytes
    connector_token: str

    def __repr__(self) -> str:
        """Without the token."""
        return f"Attached(about={self.about}, client={self.client})"


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It does not do that."""

    why: str


Knock: TypeAlias = AskAbout | AskToAttach
Answer: TypeAlias = About | Attached | Refused
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
KNOCKS: Final = msgspec.msgpack.Decoder(Knock)
ANSWERS: Final = msgspec.msgpack.Decoder(Answer)


class KnockError(CascadeError):
    """An engine cannot be reached, refuses, or is not the one that is expected."""


class KeyRefusedError(KnockError):
    """Somebody listens at an address, but not with our key."""


async def knock(host: str, port: int, key: ClusterKey, question: Knock, timeout_s: float) -> About | Attached:
    """
    Put a question to an engine.

    Raises:
        KeyRefusedError: Whoever listens there does not have this key.
        KnockError: Nobody answers in time, or the answer is a refusal.
    """
    where = f"{host}:{port}"
    context = zmq.asyncio.Context()
    try:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
        if ":" in host:
            sock.setsockopt(zmq.IPV6, 1)
        key.call(sock)
        failing = asyncio.ensure_future(_until_refused(sock))
        sock.connect(tcp_address(host, port))
        await sock.send(msgspec.msgpack.encode(question))
        answering = asyncio.ensure_future(sock.recv())
        try:
            await within(timeout_s, asyncio.wait((answering, failing), return_when=asyncio.FIRST_COMPLETED))
        finally:
            for waiting in (answering, failing):
                waiting.cancel()
            await asyncio.gather(answering, failing, return_exceptions=True)
        if answering.cancelled():
            raise KeyRefusedError(f"who listens at {where} is no engine with this key")
        answer: Answer = ANSWERS.decode(answering.result())
    except TimeoutError:
        raise KnockError(f"no engine answers at {where} (it may be loading still)") from None
    except (zmq.ZMQError, msgspec.MsgspecError) as error:
        raise KnockError(f"the engine at {where} cannot be asked: {error}") from error
    finally:
        context.destroy(linger=0)
    if isinstance(answer, Refused):
        raise KnockError(f"the engine at {where} refuses: {answer.why}")
    return answer


async def _until_refused(sock: zmq.asyncio.Socket) -> None:
    """Wait until the other end of a connection turns out not to have our key."""
    monitor: Any = sock.get_monitor_socket(HANDSHAKE_FAILED)
    await monitor.recv_multipart()


def tcp_address(host: str, port: int | str) -> str:
    """ZMQ's name of a TCP address; an IPv6 host comes in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def keep_all(sock: "zmq.Socket[Any]") -> None:
    """Drop nothing for lack of room, and keep nothing after the end of the socket."""
    for limit in (zmq.SNDHWM, zmq.RCVHWM):
        sock.setsockopt(limit, 0)
    sock.setsockopt(zmq.LINGER, 0)


def make_lasting(sock: "zmq.Socket[Any]", host: str) -> None:
    """
    Prepare a socket by which a front end and an engine talk for as long as both live.

    Nothing is dropped for lack of room, nothing is kept after the end, and the connection ends with its other side.

    Args:
        sock: Neither bound nor connected yet.
        host: Where it will be.
    """
    keep_all(sock)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    if ":" in host:
        sock.setsockopt(zmq.IPV6, 1)
