"""Knocks at the doors of engines that others have started."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cascadeinfer.cluster.addresses import EngineAddress, host_and_port, resolve
from cascadeinfer.cluster.knocking import PROTOCOL, About, AskAbout, KeyRefusedError, KnockError, knock
from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.doctor.facts import Door
from cascadeinfer.doctor.gathering.notes import Notes

KNOCK_TIMEOUT_S: Final = 10.0
OPTION: Final = "--engines"


def gather(notes: Notes, words: Sequence[str]) -> None:
    """
    Ask at all doors at once.

    Args:
        notes: For the facts.
        words: The file with the key, then HOST:PORT of each engine.
    """
    key_file, *texts = words
    key = ClusterKey.read(Path(key_file), "--cluster-key")
    asyncio.run(_ask_all(notes, key, texts))


async def _ask_all(notes: Notes, key: ClusterKey, texts: Sequence[str]) -> None:
    notes.doing("looking the engines' names up")
    addresses, failures = await resolve(tuple(host_and_port(text, OPTION) for text in texts))
    for failure in failures:
        name, _, reason = failure.partition(": ")
        notes.add(Door(address=name, error=f"the name does not resolve: {reason}"))
    notes.doing("knocking at the engines' doors")
    for door in await asyncio.gather(*(_ask(address, key) for address in addresses)):
        notes.add(door)


async def _ask(address: EngineAddress, key: ClusterKey) -> Door:
    begun_s = time.monotonic()
    try:
        about = await knock(address.host, address.port, key, AskAbout(PROTOCOL), KNOCK_TIMEOUT_S)
    except KeyRefusedError as error:
        return Door(address=str(address), refused=True, error=str(error))
    except KnockError as error:
        return Door(address=str(address), error=str(error))
    assert isinstance(about, About), about
    return Door(address=str(address), node=about.node, version=about.version, seconds=time.monotonic() - begun_s)
