"""
The systems compared, grouped by what has to be started for them.

All run the same engines: same model, dtype, context, KV blocks per instance, eager execution, and one core per engine
where there are enough. They differ in what distributes the requests: our server over its own engines; `vllm serve
--data-parallel-size N` with its own balancing and, by default, N API processes; or a router over N `vllm serve`
servers.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from processes import Service
from workloads import BLOCK_TOKENS, ModelCase

from cascadeinfer.cluster.local import free_port
from cascadeinfer.cluster.places import split_cores
from cascadeinfer.engines.vllm.connector.cores import NAP_S

N_INSTANCES = 2
MODEL_NAME = "bench"
READY_TIMEOUT_S = 420.0
ROUTER_TIMEOUT_S = 60.0
MAX_NUM_SEQS = 64
ROUTER_POLICIES = ("round_robin", "power_of_two", "cache_aware")
SERVE = [sys.executable, str(Path(__file__).parent / "vllm_serve.py"), "serve"]
NAPPING = {"PEERS_NAP_S": str(NAP_S)}
OURS = [sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "serve"]


@dataclass(frozen=True)
class Group:
    """
    A set of processes started together.

    Attributes:
        systems: Systems measured on it, one after the other.
        options: Options of our server; None for the peers.
    """

    name: str
    systems: tuple[str, ...]
    options: tuple[str, ...] | None = None


def groups_for(case: ModelCase) -> tuple[Group, ...]:
    """All groups; the first system is the reference."""
    routers = tuple(f"{kind}:{policy}" for kind in ("vllm-router", "sglang-router") for policy in ROUTER_POLICIES)
    return (
        Group("ours-stages", ("cascadeinfer stages",), ("--stages", case.stages)),
        Group("ours-cascade", ("cascadeinfer cascade",), ("--policy", "cascade")),
        Group("ours-least-loaded", ("cascadeinfer least_loaded",), ("--policy", "least_loaded")),
        Group("ours-round-robin", ("cascadeinfer round_robin",), ("--policy", "round_robin")),
        Group("vllm-dp", ("vllm data-parallel",)),
        Group("vllm-dp-spinning", ("vllm data-parallel, spinning",)),
        Group("servers", routers),
    )


@dataclass
class Setup:
    """
    What a group is started with.

    Attributes:
        model: Folder of the model.
        router_bin: Folder of the routers' commands.
        logs: Folder of logs.
    """

    case: ModelCase
    model: Path
    router_bin: Path
    logs: Path
    environment: dict[str, str] = field(default_factory=dict)


def engine_options(setup: Setup) -> list[str]:
    """Options shared by every engine of every system."""
    return [
        str(setup.model),
        "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", str(setup.case.max_model_len), "--max-num-seqs", str(MAX_NUM_SEQS),
        "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(setup.case.kv_blocks),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip


@contextlib.contextmanager
def running(group: Group, setup: Setup) -> Iterator[list[Service]]:
    """The servers of a group, ready."""
    common = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn", **setup.environment,
    }  # fmt: skip
    cores = split_cores(N_INSTANCES, sorted(os.sched_getaffinity(0)))
    options = engine_options(setup)

    with contextlib.ExitStack() as stack:  # stops what has been started, the last one first
        services: list[Service] = []

        def start(name: str, command: list[str], environment: dict[str, str]) -> None:
            port = free_port()
            command = [*command, "--port", str(port)]
            service = Service(name, command, port, setup.logs / f"{name}.log", {**common, **environment})
            services.append(stack.enter_context(service))

        if group.options is not None:
            words = ["--instances", str(N_INSTANCES), *group.options]
            start(group.name, [*OURS, *options, *words], {})
        elif group.name.startswith("vllm-dp"):
            words = ["--data-parallel-size", str(N_INSTANCES)]
            waiting = {} if group.name == "vllm-dp-spinning" else NAPPING
            place = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(cores)}
            start(group.name, [*SERVE, *options, *words], {**place, **waiting})
        else:
            for number, own in enumerate(cores):
                name = f"{group.name}-{number}"
                start(name, [*SERVE, *options], {"VLLM_CPU_OMP_THREADS_BIND": own, **NAPPING})
        for service in services:
            service.wait_ready("/health", READY_TIMEOUT_S)
        yield services


@contextlib.contextmanager
def entry_of(system: str, servers: list[Service], setup: Setup) -> Iterator[list[Service]]:
    """The service that gets the load, first, then the others: the router before the servers, or the only server."""
    kind, _, policy = system.partition(":")
    if not policy:
        yield servers
        return
    port, metrics_port = free_port(), free_port()
    command = [str(setup.router_bin / kind), *(["launch"] if kind == "sglang-router" else [])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port), "--policy", policy]
    command += ["--worker-urls", *(server.url for server in servers)]
    with Service(system, command, port, setup.logs / f"{kind}-{policy}.log") as router:
        router.wait_ready("/v1/models", ROUTER_TIMEOUT_S)
        yield [router, *servers]


__all__ = ["Group", "Setup", "entry_of", "groups_for", "running"]
