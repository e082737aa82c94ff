"""
Follows engines that others start and stop: who answers at a new address joins, who vanishes from the list is emptied.

An address that stays in the list and does not answer keeps its instance, which is down: its supervisor attaches again
when it answers. Only an address that is no longer listed, such as that of a pod that is being stopped, loses it; its
running requests are moved to others first. An engine whose instance the operator has drained is left alone until it has
been started anew.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

from cascadeinfer.core.errors import ScalingRefusedError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.elastic import DID_NOT_START
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

LOOK_S: Final = 5.0

AddressT = TypeVar("AddressT")
MakeEngine = Callable[[int], Engine]
"""Makes an engine for the n-th start."""


class Discovery(Generic[AddressT]):
    """See the module header."""

    def __init__(
        self,
        runtime: Runtime,
        known: Mapping[AddressT, InstanceId],
        find: Callable[[], Awaitable[list[AddressT] | None]],
        answers: Callable[[AddressT], Awaitable[str | None]],
        maker_of: Callable[[AddressT, InstanceId, int], MakeEngine],
        drain_timeout_s: float,
    ) -> None:
        """
        Args:
            runtime: Has the instances.
            known: Of each instance that the runtime started with, where it is.
            find: All addresses that are listed now; None if the list cannot be read.
            answers: The id of the engine that answers there, a new one for each of its starts; None if none does.
            maker_of: Makes what makes the engine at an address, given its instance's name and number.
            drain_timeout_s: Time that requests may take to leave an instance that is no longer listed.
        """
        self._runtime = runtime
        self._known = dict(known)
        self._find = find
        self._answers = answers
        self._maker_of = maker_of
        self._drain_timeout_s = drain_timeout_s
        self._numbers = itertools.count(len(known))
        #: Engines that have been drained, by where they are.
        self._drained: dict[AddressT, str | None] = {}

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception:  # a fault of ours must not end it for ever
                logger.exception("internal error while engines were looked for")

    async def look(self) -> None:
        """Look once."""
        if (listed := await self._find()) is None:
            return
        records = self._runtime.fleet.records
        for address, instance_id in list(self._known.items()):
            if instance_id not in records:
                del self._known[address]
                if self._was_drained(instance_id):
                    self._drained[address] = await self._answers(address)
            elif address not in listed and records[instance_id].drain is None:
                self._let_go(address, instance_id)
        self._drained = {address: engine for address, engine in self._drained.items() if address in listed}
        new = [address for address in listed if address not in self._known]
        for address, engine in zip(new, await asyncio.gather(*map(self._answers, new)), strict=True):
            if engine is not None and engine != self._drained.get(address):
                self._take_in(address)

    def _was_drained(self, instance_id: InstanceId) -> bool:
        """Whether a removed instance had served: one that did not start is tried again."""
        return any(
            departed.instance_id == instance_id and departed.how != DID_NOT_START
            for departed in self._runtime.fleet.departed
        )

    def _take_in(self, address: AddressT) -> None:
        number = next(self._numbers)
        instance_id = self._known[address] = str(number)
        logger.info("instance %s: an engine answers at %s", instance_id, address)
        self._runtime.elastic.adopt(instance_id, self._maker_of(address, instance_id, number))

    def _let_go(self, address: AddressT, instance_id: InstanceId) -> None:
        try:
            self._runtime.elastic.drain(instance_id, self._drain_timeout_s)
        except ScalingRefusedError as refused:
            logger.debug("instance %s stays for now: %s", instance_id, refused)
        else:
            logger.info("instance %s: %s is no longer listed", instance_id, address)
