"""What runs on the nodes of a Ray cluster, without Ray: an actor is a plain object here."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from cascadeinfer import __version__
from cascadeinfer.cluster.keeping import PLACE, PlaceTold, Told, read_json
from cascadeinfer.cluster.local import LOOPBACK, LOOPBACK_DEVICE
from cascadeinfer.cluster.ray_actors import Facts, KeeperActor, User, device_of, look_at_node
from cascadeinfer.cluster.runtime_folder import SOCKETS_VARIABLE
from cascadeinfer.core.errors import ConfigError

ADDRESS = "127.0.0.1:7300"
FOLDER = str(Path(__file__).parent)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a node has its folders; names of sockets must be short."""
    folder = Path(tempfile.mkdtemp(prefix="node"))
    monkeypatch.setenv(SOCKETS_VARIABLE, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


class Actor(KeeperActor):
    """An actor, and how often it has freed its place."""

    def __init__(self) -> None:
        """Of instance 0."""
        self.n_freed = 0
        super().__init__("blue", "0", self._free)

    def _free(self) -> None:
        self.n_freed += 1

    async def begin(self, host: str = LOOPBACK, version: str = __version__, n_cores: int = 1) -> str | None:
        """Start the stand-in."""
        environment = {"PYTHONPATH": f"{FOLDER}:{os.environ.get('PYTHONPATH', '')}", "DOOR": ADDRESS}
        return await self.start(host, ("stand_in_engine", b"content", "k" * 64, environment), n_cores, version, "{}")

    async def until(self, state: str) -> Told:
        """Follow it to a state."""
        seen = 0
        while True:
            seen, packed, _ = await self.follow(seen)
            told = msgspec.json.decode(packed, type=Told)
            if told.state == state:
                return told


@pytest_asyncio.fixture
async def actor(base: Path) -> AsyncIterator[Actor]:  # noqa: ARG001 - its effect is wanted
    """One whose engine is ended with the test."""
    actor = Actor()
    yield actor
    await actor.stop(0.0)
    if actor._observing is not None:
        actor._observing.cancel()


async def test_an_engine_on_its_node(actor: Actor, base: Path) -> None:
    """It listens on the node's address, on its interface and on cores of its own; its end is told."""
    assert await actor.begin() is None
    assert await actor.until("ready") == Told("ready", None, ADDRESS)
    folder = base / f"cascadeinfer-nodes-{os.geteuid()}" / "blue.0"
    place: PlaceTold = read_json(folder / "instances" / "0" / PLACE, PlaceTold)
    assert (place.host, place.network_device) == (LOOPBACK, LOOPBACK_DEVICE)
    assert place.resources == str(min(os.sched_getaffinity(0)))
    assert place.sharers == len(os.sched_getaffinity(0))
    assert await actor.facts() == ("{}", "k" * 64)
    await actor.kill()
    assert (await actor.until("ended")).why == "it was killed by its front end"


async def test_an_engine_ends_with_its_actor(actor: Actor) -> None:
    """However the actor ends: the kernel closes the pipe that the keeper watches."""
    assert await actor.begin(n_cores=0) is None
    await actor.until("ready")
    assert actor._keepers is not None
    os.close(actor._keepers._lifelines.pop())
    assert (await actor.until("ended")).why == "what had started it is gone"


async def test_an_actor_nobody_asks_frees_its_place(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an engine that has ended by itself holds no room."""
    monkeypatch.setattr("cascadeinfer.cluster.ray_actors.LAST_WORDS_S", 0.01)
    assert await actor.begin() is None
    await actor.until("ready")
    await actor.kill()
    assert actor._observing is not None
    await actor._observing
    assert actor.n_freed == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"version": "0.0.1"}, f"127.0.0.1 has cascadeinfer {__version__}, the server has 0.0.1"),
        ({"host": "192.0.2.77"}, "no network interface has Ray's address of this node, 192.0.2.77"),
    ],
)
async def test_a_node_that_is_not_fit(actor: Actor, wrong: dict[str, Any], why: str) -> None:
    """The reason is words."""
    assert await actor.begin(**wrong) == why


async def test_what_servers_share() -> None:
    """A record and a key, which a lost actor's successor gets again; and who uses the fleet."""
    facts = Facts(None, None)
    assert await facts.record() is None
    await facts.write("{}")
    again = Facts(await facts.record(), await facts.key())
    assert (await again.record(), await again.key()) == ("{}", await facts.key())
    assert len(await facts.key()) >= 32
    user = User("process 7")
    await user.ask_to_end()
    await user.until_asked()
    assert await user.who() == "process 7"


def test_a_look_at_a_node(tmp_path: Path) -> None:
    """Its versions, and whether the model is there."""
    version, vllm, has_path, _, _ = look_at_node(str(tmp_path))
    assert (version, has_path) == (__version__, True)
    assert vllm is not None
    assert look_at_node(str(tmp_path / "missing"))[2] is False
    assert device_of(LOOPBACK) == LOOPBACK_DEVICE
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77"):
        device_of("192.0.2.77")
