"""
From vLLM's engine arguments to N instances: each one's configuration, environment and factory.

Every start of an instance, restarts included, gets a fresh `VllmConfig` with a KV engine id of its own, so that its peers do the
handshake anew instead of reading a dead process's memory.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pydantic
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from cascadeinfer.cluster.local import LOOPBACK, free_port, split_cores, split_devices
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.instance import VllmInstance

logger = logging.getLogger(__name__)

CPU_KV_BYTES_MAX = 1 << 30
CONNECTOR_MODULE = "cascadeinfer.engines.vllm.connector"
CPU_UCX_TRANSPORTS = "tcp,shm,self,cma,sysv,posix"
"""UCX finds no InfiniBand on CPU machines and warns about it at every start without this."""


@dataclasses.dataclass(frozen=True, slots=True)
class KvTransferSettings:
    """
    Settings of the KV transfer.

    Attributes:
        lease_s: How long a cut request's blocks stay pinned at the source unless they are pulled before.
    """

    lease_s: int = 10


def check_engine_args(engine_args: AsyncEngineArgs) -> None:
    """
    Refuse vLLM options that contradict ours.

    Raises:
        ConfigError: With the option and the fix.
    """
    if engine_args.data_parallel_size > 1:
        raise ConfigError(
            "is vLLM's own way to run several engines",
            option="--data-parallel-size",
            fix="use --instances instead",
        )
    if engine_args.kv_transfer_config is not None:
        raise ConfigError("is set by CascadeInfer for live migration", option="--kv-transfer-config", fix="remove it")


def with_cpu_kv_share(engine_args: AsyncEngineArgs, n_instances: int) -> AsyncEngineArgs:
    """
    On a CPU, give each instance its share of memory for KV blocks unless the operator said how much.

    vLLM would let every instance claim most of the machine. The share is half of what is free now, divided by the instances, and at most
    `CPU_KV_BYTES_MAX`: NIXL registers each block at start, which takes seconds per gigabyte of small blocks.
    """
    said = engine_args.kv_cache_memory_bytes is not None or bool(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
    if said or not current_platform.is_cpu():
        return engine_args
    share = min(psutil.virtual_memory().available // (2 * n_instances), CPU_KV_BYTES_MAX)
    logger.info("each instance gets %.1f GiB for KV blocks (--kv-cache-memory-bytes)", share / 2**30)
    return dataclasses.replace(engine_args, kv_cache_memory_bytes=share)


def instance_config(engine_args: AsyncEngineArgs, instance_id: InstanceId, settings: KvTransferSettings) -> VllmConfig:
    """A configuration for one start of one instance."""
    transfer = KVTransferConfig(
        kv_connector="CascadeConnector",
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_both",
        kv_buffer_device="cpu" if current_platform.is_cpu() else "cuda",
        kv_load_failure_policy="recompute",
        engine_id=f"cascade-{instance_id}-{uuid.uuid4().hex[:12]}",
        kv_connector_extra_config={"kv_lease_duration": settings.lease_s},
    )
    own_args = dataclasses.replace(engine_args, kv_transfer_config=transfer)
    return own_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def instance_environments(engine_args: AsyncEngineArgs, n_instances: int) -> list[dict[str, str]]:
    """Which cores or devices each instance gets; what the operator has set in the environment wins."""
    if current_platform.is_cpu():
        cores = split_cores(n_instances, sorted(os.sched_getaffinity(0)))
        environments = [{"VLLM_CPU_OMP_THREADS_BIND": own, "UCX_TLS": CPU_UCX_TRANSPORTS} for own in cores]
    else:
        each = engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            str(i) for i in range(current_platform.device_count())
        )
        devices = split_devices(n_instances, each, visible.split(","))
        return [{"CUDA_VISIBLE_DEVICES": own} for own in devices]
    return [{k: v for k, v in e.items() if k not in os.environ} for e in environments]


def make_factories(
    engine_args: AsyncEngineArgs,
    instance_ids: tuple[InstanceId, ...],
    settings: KvTransferSettings,
    *,
    log_stats: bool,
    extra_environment: dict[str, str] | None = None,
) -> dict[InstanceId, Callable[[int], VllmInstance]]:
    """
    Per instance, what makes its engine for the n-th start.

    Raises:
        ConfigError: vLLM refuses the arguments (an unknown model folder, an impossible length), or ours contradict them.
    """
    check_engine_args(engine_args)
    engine_args = with_cpu_kv_share(engine_args, len(instance_ids))
    environments = instance_environments(engine_args, len(instance_ids))
    with _refusals():
        first_config = instance_config(engine_args, instance_ids[0], settings)

    def factory(index: int, instance_id: InstanceId) -> Callable[[int], VllmInstance]:
        def make(start: int) -> VllmInstance:
            fresh = start > 0 or index > 0
            config = instance_config(engine_args, instance_id, settings) if fresh else first_config
            environment: dict[str, Any] = {
                **environments[index],
                **(extra_environment or {}),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            }
            return VllmInstance(instance_id, index, config, environment, log_stats=log_stats)

        return make

    return {instance_id: factory(index, instance_id) for index, instance_id in enumerate(instance_ids)}


def parse_engine_args(namespace: argparse.Namespace) -> AsyncEngineArgs:
    """
    The engine arguments of a parsed command line. Finds the model, on disk or in the hub.

    Raises:
        ConfigError: vLLM refuses them, or there is no such model.
    """
    try:
        with _refusals():
            return AsyncEngineArgs.from_cli_args(namespace)
    except ConfigError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise ConfigError(
            f"{namespace.model} cannot be found: {_what_is_wrong(error.__cause__)}",
            option="MODEL",
            fix="name a Hugging Face folder or a repository within reach",
        ) from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What vLLM raises while it looks at its arguments is the operator's to mend."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"vLLM refuses the engine arguments: {_what_is_wrong(error)}") from error


def _what_is_wrong(error: BaseException, n_lines: int = 4) -> str:
    """The part of vLLM's (often long) message that says what is wrong."""
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(
            f"{'--' + str(fault['loc'][-1]).replace('_', '-') + ': ' if fault['loc'] else ''}{fault['msg']}"
            for fault in error.errors()
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:n_lines]) or type(error).__name__
