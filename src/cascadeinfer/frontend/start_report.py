"""
What a start says: which instance is how far, whenever that changes, and now and then that it goes on.

A start takes from seconds to many minutes (weights from a disk or a hub, the first compilation); nobody should have to
guess whether it hangs.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Final

import vllm

from cascadeinfer import __version__
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import InstanceId
from cascadeinfer.runtime.instance_state import State
from cascadeinfer.runtime.view import InstanceRecord

POLL_S: Final = 0.5
SILENCE_S: Final = 30.0
"""After this long without a line, one says what is still under way."""


class StartReport:
    """Turns what the instances do into lines."""

    def __init__(self, began_s: float) -> None:
        """
        Args:
            began_s: When the start began, on the caller's clock.
        """
        self._began_s = began_s
        self._said: dict[InstanceId, str] = {}
        self._said_s = began_s

    def lines(self, doing: Mapping[InstanceId, str], now_s: float) -> Iterator[str]:
        """
        The lines to say now.

        Args:
            doing: What each instance does, in words.
            now_s: The time on the caller's clock.
        """
        news: dict[str, list[InstanceId]] = {}
        for instance_id, words in doing.items():
            if self._said.get(instance_id) != words:
                news.setdefault(words, []).append(instance_id)
        self._said = dict(doing)
        passed = f"{now_s - self._began_s:.0f} s"
        if not news and now_s - self._said_s >= SILENCE_S:
            for instance_id, words in doing.items():
                news.setdefault(f"still {words}", []).append(instance_id)
        for words, instance_ids in news.items():
            self._said_s = now_s
            several = "s" if len(instance_ids) > 1 else ""
            yield f"instance{several} {', '.join(instance_ids)}: {words} ({passed})"


def doing(fleet: Iterable[InstanceRecord], stage: Callable[[InstanceId], str | None]) -> dict[InstanceId, str]:
    """
    What each instance does during the server's start, in words.

    Args:
        fleet: The instances.
        stage: How far the start of an instance's processes is, None if that is unknown.
    """
    words = {State.JOINING: "connecting to the others", State.UP: "up"}
    does = {}
    for record in fleet:
        state = record.life.state
        if state is State.ADDED:
            continue  # in the next moment it starts
        reached = stage(record.instance_id) if state is State.STARTING else None
        does[record.instance_id] = reached or words.get(state, state.value.replace("_", " "))
    return does


@contextlib.asynccontextmanager
async def reported(
    fleet: Iterable[InstanceRecord], stage: Callable[[InstanceId], str | None], say: Callable[[str], None]
) -> AsyncIterator[None]:
    """
    In this context, say how far the instances are.

    Args:
        fleet: The instances; iterated again and again.
        stage: See doing.
        say: Takes a line.
    """
    loop = asyncio.get_running_loop()
    report = StartReport(loop.time())

    def tell() -> None:
        for line in report.lines(doing(fleet, stage), loop.time()):
            say(line)

    async def keep_telling() -> None:
        while True:
            tell()
            await asyncio.sleep(POLL_S)

    telling = asyncio.ensure_future(keep_telling())
    try:
        yield
        tell()
    finally:
        telling.cancel()
        await asyncio.wait([telling])


def first_line(model: str, n_instances: int, n_front_ends: int, cluster: str) -> str:
    """Who starts what; with `--cluster static` nothing is started."""
    if cluster == "static":
        return f"cascadeinfer {__version__} (vLLM {vllm.__version__}) looks for engines of {model} that others started"
    front_ends = f", {n_front_ends} front-end processes" if n_front_ends > 1 else ""
    instances = f"{n_instances} instance{'s' if n_instances > 1 else ''}"
    return f"cascadeinfer {__version__} (vLLM {vllm.__version__}) starts {instances} of {model}{front_ends}"


def ready_lines(url: str, model: str, policy: str, layout: StageLayout | None, n_instances: int) -> list[str]:
    """The last lines of a start: where the server is, and what it serves how."""
    stages = "one stage" if layout is None or len(layout.stages) == 1 else f"stages {layout}"
    plural = "s" if n_instances > 1 else ""
    return [f"ready: {url}", f"serving {model} on {n_instances} instance{plural}, policy {policy}, {stages}"]
