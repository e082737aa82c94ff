"""
An engine for tests: one instance simulated on the running event loop, with a deterministic "model" and injected faults.

It exists to test the runtime (and to try the server's control plane without a GPU): the same commands, answers, races
and failures as a vLLM instance, in an order that the test decides. It is not a performance model: every step takes the
same time whatever its batch, unless it is given a `step_model`. Performance is predicted by the simulator in `sim/`.
`core.py` is what an instance does in a step, `process.py` serves commands between steps, `instance.py` is the engine
protocol.
"""

from cascadeinfer.engines.simulated.instance import SimulatedEngine
from cascadeinfer.engines.simulated.model import (
    SimulatedDelta,
    SimulatedParams,
    SimulatedTicket,
    SimulatedTimes,
    generate,
)

__all__ = ["SimulatedDelta", "SimulatedEngine", "SimulatedParams", "SimulatedTicket", "SimulatedTimes", "generate"]
