"""What an EngineCore says of itself, for tests in which it is none."""

from typing import Any

from cascadeinfer.engines.vllm.messages import EngineHello


def hello(**changes: Any) -> EngineHello:
    """A small engine, with these fields changed."""
    fields: dict[str, Any] = {
        "engine_id": "life1",
        "host": "here",
        "port": 5,
        "tp_size": 1,
        "block_size": 16,
        "kv_blocks": 64,
        "max_num_seqs": 4,
        "max_batched_tokens": 256,
        "max_model_len": 1024,
        "movable": True,
        "model_runner": "V1",
        "clock_s": 0.0,
    }
    return EngineHello(**(fields | changes))
