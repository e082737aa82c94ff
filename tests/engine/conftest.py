"""
Real vLLM instances for the tests of this folder, started once per session.

They start fast: forked, each in one process, without compilation, and with few KV blocks (NIXL registers each one). The
variable that selects forking is set for the processes only, after the configuration that would reset it has been made.
"""

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from zoo import (
    BLOCK,
    END_THINK_ID,
    KINDS,
    KV_BLOCKS,
    MAX_BATCHED_TOKENS,
    MAX_MODEL_LEN,
    MAX_SEQS,
    ON_V2,
    PATIENCE,
    RUNNER,
    THINK_ID,
    Zoo,
)

from cascadeinfer.core.back_off import BackOff
from cluster import STAGES, Cluster, SwitchedStages
from support.holds import hold_requests
from support.v2_states import FOLDER_VARIABLE

QUICK_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
FORK = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}


def pytest_configure(config: pytest.Config) -> None:
    """The marker of the part of the V2 tests that CI runs (`test_on_v2.py`)."""
    config.addinivalue_line("markers", "quick_v2: of the V2 tests that CI runs, see test_on_v2.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines need more time than the suite's time limit allows, above all on a busy machine."""
    for item in items:
        if item.get_closest_marker("engine") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900 if ON_V2 else 300))
        runner = item.get_closest_marker("runner")
        if runner is not None and runner.args[0] != RUNNER:
            item.add_marker(pytest.mark.skip(reason=f"of vLLM's {runner.args[0]} model runner (see CONTRIBUTING.md)"))


@pytest.fixture(scope="session", autouse=True)
def sigterm_is_as_good_as_ctrl_c() -> Iterator[None]:
    """
    SIGTERM, from `timeout` for instance, ends the tests through their fixtures.

    Servers lead their own sessions, so a signal to the tests' process group does not reach them.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def states_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where instances on the V2 runner record the states of requests whose id asks for it."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="session")
def quick_environment(states_folder: Path) -> Iterator[None]:
    """The environment in which vLLM is imported and instances are configured."""
    before = dict(os.environ)
    os.environ.update(QUICK_ENVIRONMENT, **{FOLDER_VARIABLE: str(states_folder)})
    hold_requests()
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
    """After the last test and all fixtures, no process started by the session is alive."""
    yield
    # Python's own resource tracker lives as long as this process.
    left = [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in _command(p)]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not [_command(process) for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def _command(process: psutil.Process) -> str:
    """A process's command line; empty if it has ended meanwhile, reaped or not."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_zoo(
    quick_environment: None,  # noqa: ARG001 - its effect is wanted
    tiny_model: Path,
) -> AsyncIterator[Zoo]:
    """One raw instance of each kind, all connected."""
    import asyncio

    from vllm.engine.arg_utils import AsyncEngineArgs

    from cascadeinfer.engines.vllm.configuration import KvTransferSettings
    from cascadeinfer.engines.vllm.instance import VllmInstance
    from cascadeinfer.engines.vllm.launch import make_factories

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
            n_clients=2,
            extra_environment={**FORK, "VLLM_CPU_OMP_THREADS_BIND": core},
        )
        instances[name] = factories[name](0)
        if kind.reservation_life_s is not None:
            transfer = instances[name].config.kv_transfer_config
            transfer.kv_connector_extra_config["reservation_life_s"] = kind.reservation_life_s
        # vLLM switches asynchronous scheduling off on a CPU, where it does not pay; it works there, and devices use it.
        instances[name].config.scheduler_config.async_scheduling = kind.asynchronous
        if ON_V2:
            instances[name].config.reasoning_config = reasoning()
    everyone = list(instances.values())
    try:
        await asyncio.gather(*(instance.start() for instance in everyone))
        for index, instance in enumerate(everyone):
            await instance.connect(everyone[:index])
        async with Zoo(instances) as zoo:
            yield zoo
    finally:
        await asyncio.gather(*(instance.stop(5.0) for instance in everyone))


def reasoning() -> Any:
    """Reasoning markers as token ids, without a parser: instances need them to enforce thinking budgets."""
    from vllm.config.reasoning import ReasoningConfig

    config = ReasoningConfig()
    config._reasoning_start_token_ids = [THINK_ID]
    config._reasoning_end_token_ids = [END_THINK_ID - 1, END_THINK_ID]
    config._natural_reasoning_end_token_ids = [END_THINK_ID]
    config._enabled = True
    return config


@pytest_asyncio.fixture(loop_scope="session")
async def zoo(started_zoo: Zoo) -> AsyncIterator[Zoo]:
    """The instances; after each test they must hold nothing."""
    yield started_zoo
    await started_zoo.settled()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_cluster(
    quick_environment: None,  # noqa: ARG001 - its effect is wanted
    tiny_model: Path,
) -> AsyncIterator[Cluster]:
    """Three stages of one instance each behind `AsyncLLM`; asynchronous scheduling, prefix caching."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from cascadeinfer import assemble
    from cascadeinfer.config.schema import ServeOptions
    from cascadeinfer.frontend.running import running_llm

    options = ServeOptions(instances=3, stages=STAGES, report_interval_s=0.02, kv_lease_s=30 * PATIENCE)
    policy = SwitchedStages(layout=options.layout(), retry_s=0.05)
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
        enable_prefix_caching=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "make_policy", lambda _: policy)
        runtime = assemble.make_runtime(engine_args, options, extra_environment=FORK)
    for supervisor in (state.supervisor for state in runtime.fleet):
        supervisor.back_off = BackOff(0.1, 0.1, 0.0)
        supervisor._make_engine = asynchronous(supervisor._make_engine)
    async with running_llm(runtime) as llm:
        cluster = Cluster(runtime, llm, policy)
        yield cluster
        del llm, cluster.llm  # its finaliser needs a living interpreter


def asynchronous(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """An engine factory with asynchronous scheduling, which vLLM switches off on a CPU."""

    def make_asynchronous(start: int) -> Any:
        engine = make(start)
        engine.config.scheduler_config.async_scheduling = True
        return engine

    return make_asynchronous


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(started_cluster: Cluster) -> AsyncIterator[Cluster]:
    """The cluster; before and after each test all instances are up and nothing is held."""
    await started_cluster.settled()
    yield started_cluster
    await started_cluster.settled()
