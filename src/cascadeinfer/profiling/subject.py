"""What the profiler needs to know about the engine it measures, besides the engine protocol."""

from collections.abc import Callable
from dataclasses import dataclass

from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import Engine, EngineRequest

MakeRequest = Callable[[str, list[int], int], EngineRequest]
"""From (request id, prompt token ids, output tokens): a request that produces exactly that many tokens."""


@dataclass(frozen=True, slots=True)
class Subject:
    """
    A started engine.

    Attributes:
        capacity: As reported at its start.
        max_model_tokens: Longest sequence it takes.
        kv_bytes_per_token: Of the whole instance, all its devices together.
        multiprocessors: Streaming multiprocessors of a device, used by the split rules of attention; None on a
            processor.
        graph_tokens: Tokens of a step up to which it uses full CUDA graphs, 0 if it uses none; None if it did not say.
    """

    engine: Engine
    capacity: InstanceCapacity
    max_model_tokens: int
    identity: EngineIdentity
    kv_bytes_per_token: int
    make_request: MakeRequest
    multiprocessors: int | None = None
    graph_tokens: int | None = None
