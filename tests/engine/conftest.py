"""
Real vLLM instances for the tests of this folder, started once per session.

They start fast: forked (the variable is set for the processes only, after the configuration that would reset it was made), in one process
each, without compilation, with few KV blocks (NIXL registers each one).
"""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from zoo import BLOCK, KINDS, KV_BLOCKS, MAX_BATCHED_TOKENS, MAX_MODEL_LEN, MAX_SEQS, Zoo

QUICK_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
FORK = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines need more time than the suite's time-out allows, most of all on a busy machine."""
    for item in items:
        if item.get_closest_marker("engine") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def quick_environment() -> Iterator[None]:
    """The environment in which vLLM is imported and instances are configured."""
    before = dict(os.environ)
    os.environ.update(QUICK_ENVIRONMENT)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that never ends by itself."""
    from cascadeinfer.engines.models.tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """After the last test and the end of all fixtures, no process started by the session is alive."""
    yield
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=20)
    names = [process.cmdline() for process in alive if "resource_tracker" not in " ".join(process.cmdline())]
    assert not names


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_zoo(
    quick_environment: None,  # noqa: ARG001 - its effect is wanted
    tiny_model: Path,
) -> AsyncIterator[Zoo]:
    """One raw instance of each kind, all connected."""
    import asyncio

    from vllm.engine.arg_utils import AsyncEngineArgs

    from cascadeinfer.engines.vllm.instance import VllmInstance
    from cascadeinfer.engines.vllm.launch import KvTransferSettings, make_factories

    instances: dict[str, VllmInstance] = {}
    cores = sorted(os.sched_getaffinity(0))
    for number, (name, kind) in enumerate(KINDS.items()):
        engine_args = AsyncEngineArgs(
            model=str(tiny_model),
            dtype="float32",
            block_size=BLOCK,
            enforce_eager=True,
            num_gpu_blocks_override=KV_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            max_num_seqs=MAX_SEQS,
            distributed_executor_backend="uni",
            enable_prefix_caching=kind.caches,
        )
        core = str(cores[number % len(cores)])
        factories = make_factories(
            engine_args,
            (name,),
            KvTransferSettings(lease_s=kind.lease_s),
            log_stats=False,
            extra_environment={**FORK, "VLLM_CPU_OMP_THREADS_BIND": core},
        )
        instances[name] = factories[name](0)
        if kind.reservation_life_s is not None:
            transfer = instances[name].vllm_config.kv_transfer_config
            transfer.kv_connector_extra_config["reservation_life_s"] = kind.reservation_life_s
        # vLLM switches asynchronous scheduling off on a CPU, where it does not pay; it works there, and devices use it.
        instances[name].vllm_config.scheduler_config.async_scheduling = kind.asynchronous
    everyone = list(instances.values())
    try:
        await asyncio.gather(*(instance.start() for instance in everyone))
        for index, instance in enumerate(everyone):
            await instance.connect(everyone[:index])
        async with Zoo(instances) as zoo:
            yield zoo
    finally:
        await asyncio.gather(*(instance.stop(5.0) for instance in everyone))


@pytest_asyncio.fixture(loop_scope="session")
async def zoo(started_zoo: Zoo) -> AsyncIterator[Zoo]:
    """The instances; after each test they must come to hold nothing."""
    yield started_zoo
    await started_zoo.settled()
