"""Knocking at engines' doors, in a process as the doctor does it: one that answers, one with another key, nobody."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

zmq = pytest.importorskip("zmq")

from cascadeinfer.cluster.knocking import PROTOCOL, About, AskAbout  # noqa: E402 - needs zmq
from cascadeinfer.cluster.local import LOOPBACK, free_port  # noqa: E402
from cascadeinfer.cluster.shared_key import ClusterKey  # noqa: E402
from cascadeinfer.doctor.facts import Door, End  # noqa: E402
from cascadeinfer.doctor.gathering.running import gather  # noqa: E402

KEY_TEXT, OTHER_TEXT = "k" * 40, "o" * 40
ABOUT = About(engine_id="life1", node="node7", pid=7, version="0.1.0", lease_s=10)
PATIENCE_S = 120.0
LOOK_MS = 100


@pytest.fixture
def engine() -> Iterator[str]:
    """Address of a door that answers whoever has the key."""
    key, context, stopped = ClusterKey.of(KEY_TEXT), zmq.Context(), threading.Event()
    port = free_port()

    def answer(sock: Any) -> None:
        while not stopped.is_set():
            if sock.poll(LOOK_MS):
                identity, question = sock.recv_multipart()
                assert msgspec.msgpack.decode(question, type=AskAbout) == AskAbout(PROTOCOL)
                sock.send_multipart((identity, msgspec.msgpack.encode(ABOUT)))

    with key.only_ours(context), closing(context.socket(zmq.ROUTER)) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        key.listen(sock)
        sock.bind(f"tcp://{LOOPBACK}:{port}")
        thread = threading.Thread(target=answer, args=(sock,))
        thread.start()
        yield f"{LOOPBACK}:{port}"
        stopped.set()
        thread.join()
    context.destroy(linger=0)


def doors_of(folder: Path, key: str, *engines: str) -> list[Door]:
    """What the part brings."""
    (folder / "key").write_text(key)
    found = gather("doors", [str(folder / "key"), *engines], folder, PATIENCE_S)
    assert found.end is End.DONE, found.output
    return [fact for fact in found.facts if isinstance(fact, Door)]


def test_an_engine_answers_and_nobody_does_not(engine: str, tmp_path: Path) -> None:
    """Each address has its own answer, a name that does not resolve included."""
    nobody = f"{LOOPBACK}:{free_port()}"
    doors = {door.address: door for door in doors_of(tmp_path, KEY_TEXT, engine, nobody, "no.such.host.invalid:7300")}
    assert (doors[engine].node, doors[engine].version, doors[engine].error) == ("node7", "0.1.0", "")
    assert "no engine answers" in doors[nobody].error
    assert "does not resolve" in doors["no.such.host.invalid"].error
    assert not doors[nobody].refused


def test_another_key_is_told_apart(engine: str, tmp_path: Path) -> None:
    """From an engine that is not there."""
    (door,) = doors_of(tmp_path, OTHER_TEXT, engine)
    assert door.refused
