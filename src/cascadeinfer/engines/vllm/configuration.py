"""
The configuration and the environment of one instance's processes.

Every start of an instance, restarts included, gets a fresh `VllmConfig` with a new KV engine id, so that its peers
repeat the handshake instead of reading a dead process's memory.

Engines that make their own configuration load this module, so it imports nothing that uses numba.
"""

import dataclasses
import logging
import os
import uuid
from argparse import Namespace

from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from cascadeinfer.cluster.keeping import PlaceTold
from cascadeinfer.cluster.local import free_memory_bytes
from cascadeinfer.cluster.process_start import operator_environment
from cascadeinfer.cluster.protocol import Place
from cascadeinfer.core.types import InstanceId

logger = logging.getLogger(__name__)

CPU_KV_BYTES_MAX = 1 << 30
CONNECTOR_MODULE = "cascadeinfer.engines.vllm.connector"
PEERS_STAY = 0.0
"""Time to live of what NIXL knows of a peer: without end. By default an idle hour ends it, and the next pull begins
with a handshake.
"""
CPU_UCX_TRANSPORTS = "tcp,shm,self,cma,sysv,posix"
"""UCX finds no InfiniBand on CPU machines and warns about it at every start without this."""

MAMBA_LAYOUT = {"VLLM_SSM_CONV_STATE_LAYOUT": "DS"}
"""NIXL needs this layout for models with Mamba layers; vLLM chooses it for its own connectors only, by their names. On
some CPUs it writes another one into this process's environment when it makes a configuration, unless one is there.
"""
NETWORK_DEVICE_VARIABLES = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""UCX carries KV blocks between instances, Gloo and NCCL connect an instance's own processes."""
SIDE_CHANNEL_HOST_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST"


@dataclasses.dataclass(frozen=True, slots=True)
class KvTransferSettings:
    """
    Settings of the KV transfer.

    Attributes:
        lease_s: How long a cut request's blocks stay pinned at the source unless they are pulled before.
        max_migrations: At once per instance, either way, where several front-end processes start them; None: one
            process does, and its policy keeps to its own limit.
    """

    lease_s: int = 10
    max_migrations: int | None = None


def n_ranks(engine_args: AsyncEngineArgs | Namespace) -> int:
    """Workers of one instance, each with a device or cores of its own."""
    # Less than one is refused by vLLM, in its own words, when the configuration is made.
    return max(1, engine_args.tensor_parallel_size) * max(1, engine_args.pipeline_parallel_size)


def with_cpu_kv_share(engine_args: AsyncEngineArgs, n_instances: int) -> AsyncEngineArgs:
    """
    On a CPU, give each worker its share of memory for KV blocks unless the operator said how much.

    vLLM would let every worker claim most of the machine. The share is half of what is free now, divided by the
    workers of all instances, and at most `CPU_KV_BYTES_MAX`: NIXL registers each block at start, which takes seconds
    per gigabyte of small blocks.
    """
    said = engine_args.kv_cache_memory_bytes is not None or bool(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
    if said or not current_platform.is_cpu():
        return engine_args
    share = min(free_memory_bytes() // (2 * n_instances * n_ranks(engine_args)), CPU_KV_BYTES_MAX)
    logger.info("each worker gets %.1f GiB for KV blocks (--kv-cache-memory-bytes)", share / 2**30)
    return dataclasses.replace(engine_args, kv_cache_memory_bytes=share)


def instance_config(engine_args: AsyncEngineArgs, instance_id: InstanceId, settings: KvTransferSettings) -> VllmConfig:
    """A configuration for one start of one instance."""
    transfer = KVTransferConfig(
        kv_connector="CascadeConnector",
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        engine_id=f"cascade-{instance_id}-{uuid.uuid4().hex[:12]}",
        kv_connector_extra_config={"kv_lease_duration": settings.lease_s, "engine_ttl": PEERS_STAY},
    )
    own_args = dataclasses.replace(engine_args, kv_transfer_config=transfer)
    for name, value in MAMBA_LAYOUT.items():
        os.environ.setdefault(name, value)
    return own_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def attached_config(engine_args: AsyncEngineArgs) -> VllmConfig:
    """A configuration for what a front end reads from it of engines that it does not start."""
    return instance_config(engine_args, "attached", KvTransferSettings())


def environment_of(place: Place | PlaceTold) -> dict[str, str]:
    """What an instance's processes get so that they use only their place and its network interface; the operator's
    settings win. Without resources, they take what whoever started them has left to them.
    """
    ours = {**dict.fromkeys(NETWORK_DEVICE_VARIABLES, place.network_device), **MAMBA_LAYOUT}
    if current_platform.is_cpu():
        ours |= {"UCX_TLS": CPU_UCX_TRANSPORTS}
        if place.resources is not None:
            ours |= {"VLLM_CPU_OMP_THREADS_BIND": place.resources}
    said = operator_environment()
    free = {name: value for name, value in ours.items() if name not in said}
    if current_platform.is_cpu() or place.resources is None:
        return free
    return {**free, "CUDA_VISIBLE_DEVICES": place.resources}
