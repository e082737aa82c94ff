"""The cluster's key: the same secret gives the same pair, and a listener takes in nobody without it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from cascadeinfer.cluster.addresses import EngineAddress, host_and_port, resolve
from cascadeinfer.cluster.knocking import (
    KNOCKS,
    PROTOCOL,
    About,
    AskAbout,
    AskToAttach,
    Attached,
    KeyRefusedError,
    Knock,
    KnockError,
    Refused,
    knock,
)
from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.shared_key import ClusterKey, others_may_read
from cascadeinfer.core.errors import ConfigError

KEY = ClusterKey.of("a" * 32)
ABOUT = About("life1", "somewhere", 7, "1.0", 10)
PATIENCE_S = 30.0


class Listener:
    """An engine's listener that answers every question alike."""

    def __init__(self, answer: bytes) -> None:
        """Listen."""
        self.asked: list[Knock] = []
        self._answer = answer
        self._plain = zmq.Context()
        self._context = zmq.asyncio.Context(self._plain)
        self._only_ours = KEY.only_ours(self._plain)
        self._only_ours.__enter__()
        self._sock = self._context.socket(zmq.ROUTER)
        KEY.listen(self._sock)
        self.port = self._sock.bind_to_random_port(f"tcp://{LOOPBACK}")
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            sender, message = await self._sock.recv_multipart()
            self.asked.append(KNOCKS.decode(message))
            await self._sock.send_multipart([sender, self._answer])

    async def close(self) -> None:
        """Close all sockets."""
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._only_ours.__exit__(None, None, None)
        self._sock.close(linger=0)
        self._plain.term()


@pytest_asyncio.fixture
async def listener() -> AsyncIterator[Listener]:
    """A listener that tells about its engine."""
    listener = Listener(msgspec.msgpack.encode(ABOUT))
    yield listener
    await listener.close()


async def test_who_has_the_key_is_answered(listener: Listener) -> None:
    """The question arrives as it was put."""
    question = AskToAttach(PROTOCOL, "tcp://a:1", "tcp://a:2")
    assert await knock(LOOPBACK, listener.port, KEY, question, PATIENCE_S) == ABOUT
    assert listener.asked == [question]


@pytest.mark.parametrize("secret", ["b" * 32, "a" * 33])
async def test_another_key_is_noticed(listener: Listener, secret: str) -> None:
    """It is told apart from an engine that does not answer, and the question does not get through."""
    with pytest.raises(KeyRefusedError, match=f"{LOOPBACK}:{listener.port}"):
        await knock(LOOPBACK, listener.port, ClusterKey.of(secret), AskAbout(PROTOCOL), PATIENCE_S)
    assert listener.asked == []


async def test_without_a_key_nothing_gets_through(listener: Listener) -> None:
    """A socket without CURVE sends in vain; who has the key is answered as before."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://{LOOPBACK}:{listener.port}")
        await stranger.send(msgspec.msgpack.encode(AskAbout(PROTOCOL)))
        assert await knock(LOOPBACK, listener.port, KEY, AskAbout(PROTOCOL), PATIENCE_S) == ABOUT
        assert len(listener.asked) == 1


async def test_nobody_answers() -> None:
    """An engine that is loading does not listen yet."""
    with pytest.raises(KnockError, match="no engine answers at"):
        await knock(LOOPBACK, free_port(), KEY, AskAbout(PROTOCOL), 0.2)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(msgspec.msgpack.encode(Refused("not today")), "refuses: not today"), (b"\xc1", "cannot be asked")],
)
async def test_answers_that_are_none(answer: bytes, error: str) -> None:
    """A refusal is passed on, and what is no answer is an error as well."""
    listener = Listener(answer)
    try:
        with pytest.raises(KnockError, match=error):
            await knock(LOOPBACK, listener.port, KEY, AskAbout(PROTOCOL), PATIENCE_S)
    finally:
        await listener.close()


def test_a_key_file(tmp_path: Path) -> None:
    """White space around the secret does not count, and the secret is never shown."""
    file = tmp_path / "key"
    file.write_text("a" * 32 + "\n")
    file.chmod(0o600)
    key = ClusterKey.read(file, "--cluster-key")
    assert key == KEY
    assert key.secret.decode() not in repr(key)
    assert not others_may_read(file)
    file.chmod(0o640)
    assert others_may_read(file)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "cannot read .*No such file"),
        (b"short", "at least 32 characters, this one has 5"),
        (b"\xff" * 40, "no text"),
    ],
)
def test_bad_key_files(tmp_path: Path, content: bytes | None, error: str) -> None:
    """The message names the option and says how a key is made."""
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=error) as caught:
        ClusterKey.read(file, "--cluster-key")
    assert "--cluster-key" in str(caught.value)
    assert "openssl rand -hex 32" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10.0.0.7:7300", ("10.0.0.7", 7300)), (" engines:1 ", ("engines", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    """Names, IPv4, and IPv6 in brackets."""
    assert host_and_port(text, "--engines") == expected


@pytest.mark.parametrize("text", ["", "host", ":7300", "host:", "host:0", "host:65536", "host:x", "host:٣", "::1:7300"])
def test_what_is_no_address(text: str) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match="--engines"):
        host_and_port(text, "--engines")


async def test_names_are_looked_up() -> None:
    """All addresses come in order, each once; a name that does not exist is told and does not hide the others."""
    entries = (
        ("127.0.0.2", 5),
        ("127.0.0.1", 5),
        ("127.0.0.2", 5),
        ("nowhere.invalid", 5),
        ("x" * 64, 5),
        ("127.0.0.1", 4),
    )
    listed, unknown = await resolve(entries)
    assert list(map(str, listed)) == ["127.0.0.2:5", "127.0.0.1:5", "127.0.0.1:4"]
    assert [text.split(":")[0] for text in unknown] == ["nowhere.invalid", "x" * 64]
    assert str(EngineAddress("::1", 5)) == "[::1]:5"


def test_the_token_does_not_show() -> None:
    """Answers may be logged."""
    assert "secret" not in repr(Attached(ABOUT, 1, b"", "secret"))
