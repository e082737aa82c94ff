"""
The directory of instances: each one's supervisor and what is known of it, the stages they form; how a new one is connected to the others.

An instance is in the directory from before its start until it is taken away; it has an engine here only while it is up and connected.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.plan.layout import StageLayout
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.metrics import InstanceGauges
from cascadeinfer.runtime.supervise import Listener, SupervisionTimes, Supervisor
from cascadeinfer.runtime.view import InstanceState


class Fleet:
    """
    All instances of a runtime.

    Attributes:
        states: What is known of each.
        layout: The stages in force, as the policy has published them.
    """

    def __init__(
        self,
        make_engines: Mapping[InstanceId, Callable[[int], Engine]],
        listener: Listener,
        times: SupervisionTimes,
    ) -> None:
        """
        Args:
            make_engines: Per instance, what makes its engine for the n-th start.
            listener: Who is told what happens to them.
            times: Limits and intervals of their supervision.
        """
        self.states = {
            instance_id: InstanceState(Supervisor(instance_id, make, listener, times))
            for instance_id, make in make_engines.items()
        }
        self.layout: StageLayout | None = None
        self._joining = asyncio.Lock()

    def __iter__(self) -> Iterator[InstanceState]:
        """All instances, up or not; safe against changes on the way."""
        return iter(list(self.states.values()))

    def __getitem__(self, instance_id: InstanceId) -> InstanceState:
        """What is known of an instance."""
        return self.states[instance_id]

    def engine(self, instance_id: InstanceId) -> Engine | None:
        """The engine when it is up."""
        state = self.states.get(instance_id)
        return None if state is None else state.engine

    def live_engines(self) -> list[Engine]:
        """Engines that are up, in the order in which they were made known."""
        return [state.engine for state in self.states.values() if state.engine is not None]

    def gauges(self) -> list[InstanceGauges]:
        """All instances for Prometheus."""
        return [state.gauges(self.layout) for state in self]

    async def start(self) -> None:
        """
        Start all in parallel; returns when every one is up.

        Raises:
            EngineError: One did not start. The others may run: call `stop`.
        """
        starts = [asyncio.ensure_future(state.supervisor.start()) for state in self]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()
        for state in self:
            await state.first_up()

    async def join(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """
        An instance has started: connect it to all that are up. From now on it counts as up.

        Raises:
            EngineError: It cannot be connected to a living one.
        """
        async with self._joining:
            for peer in self.live_engines():
                try:
                    await engine.connect([peer])
                except EngineError:
                    if self.engine(peer.instance_id) is peer:
                        raise  # the peer lives: the fault is on this side
            self.states[engine.instance_id].came_up(engine, capacity)

    async def stop(self, timeout_s: float) -> None:
        """Stop all for good."""
        await asyncio.gather(*(state.supervisor.stop(timeout_s) for state in self))
