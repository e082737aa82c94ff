"""
Tracks which instances have completed the handshake with each other, and introduces newcomers, several at a time.

Each pair has its own task, which retries until it succeeds or either instance is gone. A newcomer does the handshake
with all that are up, then looks again, and comes up in the same turn of the event loop in which it finds nobody new. So
of two simultaneous newcomers the later one finds the other, and a hung handshake delays only its own newcomer.
Instances whose KV caches do not go together, during a rolling update, are not introduced to each other.

A pair is doubted when a migration ends while the target reads from the source, or when a pull does not end in time: it
counts as broken until the target reaches the source's side channel, which takes a message where nothing is wrong. So
two nodes that cannot reach each other cost one request a pause, not every one that would cross, and strand few blocks.

A failed pair is broken: both instances serve, migrations between them are refused, and the handshake is retried.
`core/handshakes.py` determines which side is at fault: a faulty newcomer does not come up; an instance that is up and
whose side channel fails to answer twice is restarted.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.handshakes import diagnose
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""A newcomer that has completed one handshake waits no longer than this for the others."""
RETRY_FIRST_S: Final = 5.0
"""Pause between a failure and the next try; doubles each time."""
RETRY_MAX_S: Final = 60.0
NO_ANSWER = "its side channel does not answer"

Pair: TypeAlias = frozenset[Engine]


class BrokenPair(NamedTuple):
    """Two instances that are up and not connected, since when, and why."""

    instance_ids: tuple[InstanceId, ...]
    error: str
    since_s: float


@dataclass(slots=True, eq=False)
class Acquaintance:
    """
    A pair of instances.

    Attributes:
        newcomer: The one that came later, or again.
        settled: Set after the first try.
        connected: Whether they have shaken hands.
        error: Why not, so far.
        newcomer_answers: Whether its side channel did when it was asked last.
        peer_answers: The same of the other.
    """

    newcomer: Engine
    peer: Engine
    since_s: float
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    connected: bool = False
    error: str = "the handshake is under way"
    newcomer_answers: bool = True
    peer_answers: bool = True
    task: asyncio.Task[None] | None = None


class Pairs:
    """
    See the module header.

    Attributes:
        strict: The server starts: a pair that fails keeps it from starting, and newcomers wait for each other.
        foreign: Broken pairs as reported by the process that connects the instances, if it is not this one.
    """

    def __init__(
        self,
        live_engines: Callable[[], list[Engine]],
        condemn: Callable[[Engine, str], None],
        may_exchange: Callable[[Engine, Engine], bool] = lambda _one, _other: True,
    ) -> None:
        """
        Args:
            live_engines: Those that are up now.
            condemn: Called with the instance to restart, and why.
            may_exchange: Whether the KV cache of one is of use to the other at all.
        """
        self._live_engines = live_engines
        self._condemn = condemn
        self._may_exchange = may_exchange
        self._known: dict[Pair, Acquaintance] = {}
        self.strict = False
        self.foreign: frozenset[tuple[InstanceId, ...]] = frozenset()

    def connected(self, one: Engine, other: Engine) -> bool:
        """Whether KV cache can go from one to the other."""
        known = self._known.get(frozenset((one, other)))
        return known is not None and known.connected and _ids(one, other) not in self.foreign

    def broken(self) -> list[BrokenPair]:
        """Of those that are up, the pairs that are not connected."""
        own = [
            BrokenPair(_ids(known.newcomer, known.peer), known.error, known.since_s)
            for one, other in itertools.combinations(self._live_engines(), 2)
            if (known := self._known.get(frozenset((one, other)))) is not None and not known.connected
        ]
        return own + [BrokenPair(ids, "process 0 cannot connect them", 0.0) for ids in sorted(self.foreign)]

    async def introduce(self, newcomer: Engine) -> None:
        """
        Connect one that is about to come up to all that are.

        Raises:
            EngineError: It cannot be connected, and that is its own fault.
        """
        end_s = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            peers = [peer for peer in self._live_engines() if self._may_exchange(newcomer, peer)]
            known = [self._acquaintance(newcomer, peer) for peer in peers]
            pending = [pair for pair in known if not pair.settled.is_set()]
            is_connected = any(pair.connected for pair in known)
            left_s = end_s - asyncio.get_running_loop().time()
            if not pending or (is_connected and left_s < 0.01 and not self.strict):
                break
            await _first_of(pending, left_s if is_connected and not self.strict else None)
        failed = [pair for pair in known if pair.settled.is_set() and not pair.connected]
        if failed and self.strict:
            raise EngineError(failed[0].error, instance_id=newcomer.instance_id)
        diagnosis = diagnose(
            [pair.peer.instance_id for pair in known if pair.connected],
            all(pair.newcomer_answers for pair in failed),
            {pair.peer.instance_id: pair.peer_answers for pair in failed},
        )
        if diagnosis.newcomer is not None:
            raise EngineError(f"cannot be connected: {diagnosis.newcomer}", instance_id=newcomer.instance_id)
        for pair in known:
            if not pair.connected:
                logger.error(
                    "instance %s joins without %s: %s", newcomer.instance_id, pair.peer.instance_id, pair.error
                )

    def doubt(self, target: Engine, source: Engine, why: str) -> None:
        """Nothing goes between the two until the target has reached the source; ignored if they are not connected."""
        pair = self._known.get(frozenset((target, source)))
        if pair is None or not pair.connected:
            return
        loop = asyncio.get_running_loop()
        pair.connected, pair.error, pair.since_s = False, why, loop.time()
        name = f"doubt-{source.instance_id}-{target.instance_id}"
        pair.task = loop.create_task(self._until_reached(pair, target, source), name=name)

    async def _until_reached(self, pair: Acquaintance, target: Engine, source: Engine) -> None:
        both = " and ".join(_ids(target, source))
        for n_failures in itertools.count():
            if await _reaches(target, source):
                pair.connected = True
                if n_failures:
                    logger.warning("instances %s reach each other", both)
                return
            if not n_failures:
                logger.warning("instances %s exchange nothing for now: %s", both, pair.error)
            pair.error = f"{target.instance_id} cannot reach {source.instance_id}"
            await asyncio.sleep(min(RETRY_FIRST_S * 2.0**n_failures, RETRY_MAX_S))

    def forget(self, instance_id: InstanceId) -> None:
        """One is gone: those that wait for it go on."""
        for pair in list(self._of(instance_id)):
            del self._known[frozenset((pair.newcomer, pair.peer))]
            pair.settled.set()
            assert pair.task is not None
            pair.task.cancel()

    async def stop(self) -> None:
        """Stop trying."""
        tasks = [pair.task for pair in self._known.values() if pair.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _of(self, instance_id: InstanceId) -> Iterator[Acquaintance]:
        for pair in self._known.values():
            if instance_id in {pair.newcomer.instance_id, pair.peer.instance_id}:
                yield pair

    def _acquaintance(self, newcomer: Engine, peer: Engine) -> Acquaintance:
        key = frozenset((newcomer, peer))
        if (known := self._known.get(key)) is None:
            loop = asyncio.get_running_loop()
            known = self._known[key] = Acquaintance(newcomer, peer, loop.time())
            name = f"pair-{newcomer.instance_id}-{peer.instance_id}"
            known.task = loop.create_task(self._keep_trying(known), name=name)
        return known

    async def _keep_trying(self, pair: Acquaintance) -> None:
        for n_failures in itertools.count(1):
            try:
                await pair.newcomer.connect([pair.peer])
            except Exception as error:  # whatever it is, it must not end either instance
                if not isinstance(error, EngineError):
                    logger.exception("internal error in the handshake of %s", _ids(pair.newcomer, pair.peer))
                pair.error = str(error)
            else:
                pair.connected = True
                pair.settled.set()
                if n_failures > 1:
                    logger.warning("instances %s are connected now", " and ".join(_ids(pair.newcomer, pair.peer)))
                return
            pair.newcomer_answers, pair.peer_answers = await asyncio.gather(
                _listens(pair.newcomer), _listens(pair.peer)
            )
            if n_failures > 1:
                self._condemn_the_deaf(pair)
            pair.settled.set()
            if self._known.get(frozenset((pair.newcomer, pair.peer))) is not pair:
                return  # one is gone: a handshake that fails as it is cancelled tells of its failure only
            await asyncio.sleep(min(RETRY_FIRST_S * 2.0 ** (n_failures - 1), RETRY_MAX_S))

    def _condemn_the_deaf(self, pair: Acquaintance) -> None:
        if not pair.peer_answers:
            self._condemn(pair.peer, NO_ANSWER)
        if not pair.newcomer_answers:
            self._condemn(pair.newcomer, NO_ANSWER)


def _ids(one: Engine, other: Engine) -> tuple[InstanceId, ...]:
    return tuple(sorted((one.instance_id, other.instance_id)))


async def _listens(engine: Engine) -> bool:
    """Whether its side channel answers; one that dies meanwhile is not blamed for that."""
    try:
        return await engine.listens()
    except EngineError:
        return True


async def _reaches(target: Engine, source: Engine) -> bool:
    """Whether one reaches the other; not while it is about to be gone. Whatever goes wrong, it is asked again."""
    try:
        return await target.reaches(source)
    except EngineError:
        return False
    except Exception:
        logger.exception("internal error while %s looked for %s", target.instance_id, source.instance_id)
        return False


async def _first_of(pairs: list[Acquaintance], timeout_s: float | None) -> None:
    """Wait until one has been tried."""
    waits = [asyncio.ensure_future(pair.settled.wait()) for pair in pairs]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
