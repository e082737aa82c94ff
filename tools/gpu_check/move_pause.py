"""
Part `pause`: the pause of a move by context length, pull against recompute; `benchmarks/migration_pause.py` on the GPU.

Two instances with half of the GPU each, the shape of a real model in bfloat16 with random weights. See that benchmark
for what a repetition is.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any, Final

from part_options import options_of
from row_log import RowLog
from stand_ins import benchmarks_importable, device_memory_bytes, largest_for, write_model

CONTEXTS: Final = {"cuda": (1000, 4000, 16_000, 64_000), "cpu": (200, 1000)}
REPETITIONS: Final = {"cuda": 7, "cpu": 2}
MEMORY_SHARE: Final = 0.43
"""Of the GPU, for each instance."""
INSTANCES_ON_ONE: Final = 2


def engine_options(device: str, folder: Path) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`."""
    import measuring  # noqa: PLC0415 - of the benchmarks

    if device == "cpu":
        return measuring.tiny_engine_args(folder, max_model_tokens=2048, kv_blocks=160)
    shape = largest_for(device_memory_bytes() / INSTANCES_ON_ONE)
    return {
        "model": str(write_model(folder, shape)), "served_model_name": shape.name, "load_format": "dummy",
        "dtype": "bfloat16", "max_model_len": max(CONTEXTS["cuda"]) + 2048, "seed": 0,
        "gpu_memory_utilization": MEMORY_SHARE,
    }  # fmt: skip


async def run_all(options: argparse.Namespace, folder: Path) -> None:
    """Start two instances, measure the contexts that are missing, stop them."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - imports vLLM

    import migration_pause  # noqa: PLC0415 - imports vLLM
    from cascadeinfer.cluster.runtime_folder import runtime_folder  # noqa: PLC0415 - imports vLLM
    from cascadeinfer.engines.vllm.configuration import KvTransferSettings  # noqa: PLC0415 - imports vLLM
    from cascadeinfer.engines.vllm.launch import make_factories  # noqa: PLC0415 - imports vLLM

    arguments = engine_options(options.device, folder)
    settings = {
        "repetitions": REPETITIONS[options.device],
        "prompt_seed": "number of the context",
        **{k: v for k, v in arguments.items() if k != "model"},
    }
    with RowLog(options.rows, settings) as log, runtime_folder():
        factories = make_factories(AsyncEngineArgs(**arguments), ("0", "1"), KvTransferSettings(), log_stats=False)
        instances = [make(0) for make in factories.values()]
        try:
            for instance in instances:  # one by one: each looks at the memory that is free
                await instance.start()
            await instances[0].connect(instances[1:])
            for seed, context in enumerate(CONTEXTS[options.device]):
                if not log.has(f"context {context}"):
                    row = await migration_pause.measure(instances, context, REPETITIONS[options.device], seed)
                    log.add(f"context {context}", **row)
        finally:
            await asyncio.gather(*(instance.stop(5.0) for instance in instances))


def main() -> None:
    """Measure."""
    options = options_of(__doc__)
    benchmarks_importable()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run_all(options, Path(folder)))


if __name__ == "__main__":
    main()
