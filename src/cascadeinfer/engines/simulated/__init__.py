"""
An engine for tests: one instance simulated on the running event loop, with a deterministic "model" and injected faults.

It exists to test the runtime: the same commands, answers, races and failures as a vLLM instance, in an order that a test decides. It is no
performance model: a step takes the same time whatever is in it, unless it is given a `step_model`. What predicts performance is the simulator in
`sim/`. `core.py` is what an instance does in a step, `process.py` what serves commands between steps, `instance.py` the engine protocol.
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
