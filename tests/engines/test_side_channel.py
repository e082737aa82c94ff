"""An instance's side channel answers questions, survives everything else, and is reopened when it was closed."""

import socket
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.engines.vllm.connector.side_channel import MAX_MESSAGE_BYTES, SideChannel, answers

ENCODE = msgspec.msgpack.encode
RUBBISH: list[list[bytes]] = [
    [b""],
    [b"\xff\xfe"],
    [b"", b"\xc1"],
    [b"", b""],
    [b"", ENCODE(17)],
    [b"", ENCODE((GET_META_MSG, 0))],
    [b"", ENCODE((GET_META_MSG, "0", 0))],
    [b"", ENCODE((GET_META_MSG, 7, 7))],
    [b"", ENCODE((b"who are you", 0, 0))],
    [b"", ENCODE((GET_META_MSG, 0, 0)), b"more"],
    [b"", b"\x81" * MAX_MESSAGE_BYTES],
    [b"", bytes(1 << 20)],
]


class Opened:
    """A side channel with its thread."""

    def __init__(self) -> None:
        """Open it."""
        self.port = free_port()
        self.channel = SideChannel()
        self.stop = threading.Event()
        ready = threading.Event()
        arguments = ({(0, 0): b"metadata"}, ready, self.stop, LOOPBACK, self.port)
        self.thread = threading.Thread(target=self.channel.listen, args=arguments, daemon=True)
        self.thread.start()
        assert ready.wait(30.0)


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Opened]:
    """An open side channel, closed afterwards."""
    opened = Opened()
    yield opened
    opened.stop.set()


async def test_it_answers(opened: Opened) -> None:
    """It answers what vLLM's workers ask (metadata) and what we ask (the clock)."""
    assert await answers(LOOPBACK, opened.port)
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.RCVTIMEO, 30_000)
        sock.connect(f"tcp://{LOOPBACK}:{opened.port}")
        sock.send(ENCODE((GET_META_MSG, 0, 0)))
        metadata, clock = sock.recv_multipart()
    assert metadata == b"metadata"
    assert isinstance(msgspec.msgpack.decode(clock), float)


@pytest.mark.parametrize("frames", RUBBISH, ids=range(len(RUBBISH)))
async def test_it_survives_rubbish(opened: Opened, frames: list[bytes]) -> None:
    """Malformed messages are dropped; the same thread answers the next question."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 1000)
        sock.connect(f"tcp://{LOOPBACK}:{opened.port}")
        sock.send_multipart(frames)
    assert await answers(LOOPBACK, opened.port)
    assert opened.thread.is_alive()


async def test_it_survives_who_speaks_no_zmq(opened: Opened) -> None:
    """It survives bytes of another protocol, and connections that say nothing."""
    with socket.create_connection((LOOPBACK, opened.port)), socket.create_connection((LOOPBACK, opened.port)) as web:
        web.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        assert await answers(LOOPBACK, opened.port)


async def test_it_is_opened_again(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its thread has ended for whatever reason, the next check reopens it on the same port."""

    def fail(*_: object) -> None:
        raise zmq.ZMQError(zmq.ENOTSOCK)

    with monkeypatch.context() as patch:
        patch.setattr(opened.channel, "_answer_one", fail)
        opened.thread.join(30.0)
        assert not opened.thread.is_alive()
        with socket.socket() as sock:
            assert sock.connect_ex((LOOPBACK, opened.port)) != 0
    assert opened.channel.listens()
    assert await answers(LOOPBACK, opened.port)


async def test_it_says_so_when_it_cannot_be_opened(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody else has the port, `listens` is false; it is true again once the port is free."""

    def fail(*_: object) -> None:
        raise zmq.ZMQError(zmq.ENOTSOCK)

    with monkeypatch.context() as patch:
        patch.setattr(opened.channel, "_answer_one", fail)
        opened.thread.join(30.0)
    with socket.create_server((LOOPBACK, opened.port)):
        assert not opened.channel.listens()
    assert opened.channel.listens()
