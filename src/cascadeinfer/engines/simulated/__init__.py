"""
An engine for tests: one instance simulated on the running event loop, with a deterministic "model" and injected faults.

It exists to test the runtime (and to try the server's control plane without a GPU): the same commands, answers, races
and failures as a vLLM instance, in an order that the test decides. It is not a performance model: every step takes the
same time whatever its batch. Performance is predicted by the simulator in `sim/`.
"""

from cascadeinfer.engines.simulated.instance import SimulatedEngine
from cascadeinfer.engines.simulated.model import SimulatedDelta, SimulatedParams, SimulatedTimes, generate

__all__ = ["SimulatedDelta", "SimulatedEngine", "SimulatedParams", "SimulatedTimes", "generate"]
