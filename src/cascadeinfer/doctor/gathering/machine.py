"""Facts of this machine that cost nothing to ask: cores, memory, limits, folders, ports, network adapters, settings."""

import contextlib
import os
import platform
import resource
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from cascadeinfer.cluster.local import LOOPBACK, usable_cores
from cascadeinfer.cluster.runtime_folder import SOCKETS_VARIABLE, RuntimeFolder
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.doctor.facts import Machine, RdmaPort
from cascadeinfer.doctor.gathering.notes import Notes

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - it is asked about, not written to
CGROUP: Final = Path("/sys/fs/cgroup")
ADAPTERS: Final = Path("/sys/class/infiniband")
PEER_MEMORY: Final = (Path("/sys/module/nvidia_peermem"), Path("/sys/module/nv_peer_mem"))
PROCESSOR: Final = Path("/proc/cpuinfo")
SETTINGS: Final = (
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "UCX_IB_GPU_DIRECT_RDMA",
    "UCX_NET_DEVICES", "UCX_TLS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_KV_CACHE_LAYOUT", "VLLM_NIXL_SIDE_CHANNEL_HOST",
    "VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD",
)  # fmt: skip
"""Variables that are reported. No others are, so that no key can get into a report."""


def gather(notes: Notes, words: Sequence[str]) -> None:
    """
    Ask for everything.

    Args:
        notes: For the facts.
        words: The port of the server.
    """
    port = int(words[0])
    quota, limit_bytes, used_bytes = container_limits(CGROUP)
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    if limit_bytes is not None:
        total, free = min(total, limit_bytes), min(free, max(0, limit_bytes - used_bytes))
    shared = shared_memory(SHARED_MEMORY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder_fault, folder_fix = folder_trial()
    notes.add(
        Machine(
            system=platform.platform(),
            processor=processor(PROCESSOR),
            cores=len(usable_cores()),
            cpu_quota=quota,
            memory_bytes=total,
            free_memory_bytes=free,
            shared_memory_bytes=shared[0],
            free_shared_memory_bytes=shared[1],
            open_files=_limit(soft),
            open_files_max=_limit(hard),
            locked_memory_bytes=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
            folder_fault=folder_fault,
            folder_fix=folder_fix,
            loopback_fault=loopback_trial(),
            port=port,
            port_fault=port_trial(port),
            rdma=rdma_ports(ADAPTERS),
            peer_memory=any(path.exists() for path in PEER_MEMORY),
            settings=settings_of(os.environ),
        )
    )


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def processor(path: Path) -> str:
    """The processor's name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())


def container_limits(cgroup: Path) -> tuple[float | None, int | None, int]:
    """
    The container's quota in cores, its memory limit, and what it uses of that; None where there is no limit.

    Args:
        cgroup: Where the kernel shows them (version 2).
    """

    def words_of(name: str) -> list[str]:
        with contextlib.suppress(OSError):
            return (cgroup / name).read_text(encoding="utf-8").split()
        return []

    quota, memory, used = words_of("cpu.max"), words_of("memory.max"), words_of("memory.current")
    cores = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0] != "max" else None
    limit = int(memory[0]) if memory and memory[0] != "max" else None
    return cores, limit, int(used[0]) if used else 0


def shared_memory(path: Path) -> tuple[int | None, int | None]:
    """Size of the shared memory's file system and what is free of it; None without one."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None, None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def folder_trial() -> tuple[str, str]:
    """Make a server's private folder and remove it; returns what is wrong and what helps, both empty if it works."""
    try:
        RuntimeFolder.create(Path(os.environ.get(SOCKETS_VARIABLE) or tempfile.gettempdir())).remove()
    except ConfigError as error:
        return str(error).removesuffix(f" ({error.fix})"), error.fix or ""
    except OSError as error:
        return error.strerror or str(error), "set TMPDIR to a folder that can be written"
    return "", ""


def loopback_trial() -> str:
    """Connect to ourselves; returns why that fails, or nothing."""
    try:
        with socket.create_server((LOOPBACK, 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def port_trial(port: int) -> str:
    """Bind the port, as a server would; returns why that fails, or nothing."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def rdma_ports(adapters: Path) -> list[RdmaPort]:
    """The ports of RDMA adapters, from what the kernel shows of them."""

    def told(path: Path) -> str:
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8").strip().rpartition(":")[2].strip()
        return "unknown"

    return [
        RdmaPort(
            device=port.parents[1].name,
            port=port.name,
            state=told(port / "state"),
            link_layer=told(port / "link_layer"),
        )
        for port in sorted(adapters.glob("*/ports/*"))
    ]


def settings_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the list that are set."""
    return {name: environment[name] for name in SETTINGS if name in environment}
