"""A simulated engine to profile. Its step model is known, so the profiler's findings can be compared with the truth."""

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import EngineRequest
from cascadeinfer.engines.simulated import SimulatedEngine, SimulatedTimes
from cascadeinfer.engines.simulated.model import IDENTITY as simulated_identity  # noqa: N811 - it has the constants below
from cascadeinfer.profiling.subject import Subject

CAPACITY = InstanceCapacity(kv_blocks=1000, block_size_tokens=16, max_num_seqs=32, max_batched_tokens=512)
MAX_MODEL_TOKENS = 4096
IDENTITY, KV_BYTES_PER_TOKEN, *_ = simulated_identity
TRUTH = StepModel(
    base_s=5e-3,
    per_decode_s=4e-5,
    per_kv_token_s=3e-7,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=4e-9,
)


def make_request(request_id: str, prompt: list[int], output_tokens: int) -> EngineRequest:
    """A request that ends after this many tokens."""
    return EngineRequest(request_id, prompt, output_tokens, None)


async def started(
    name: str = "0",
    *,
    model: StepModel = TRUTH,
    capacity: InstanceCapacity = CAPACITY,
    max_model_tokens: int = MAX_MODEL_TOKENS,
) -> Subject:
    """A started engine whose steps take as long as the model says."""
    engine = SimulatedEngine(name, 0, capacity, max_model_len=max_model_tokens, times=SimulatedTimes(step_model=model))
    return Subject(engine, await engine.start(), max_model_tokens, IDENTITY, KV_BYTES_PER_TOKEN, make_request)
