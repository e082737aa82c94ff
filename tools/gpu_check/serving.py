"""
Part `serving`: our server and vLLM's own data-parallel balancing, four small instances each, all on the one GPU.

Systems take turns, round after round; within a round they get the same lengths and arrivals, and other words, so that
no prefix cache helps. `cascadeinfer bench` replays the trace. Four engines that share one GPU wait for one another, so
this says how the systems compare on such a machine, not what stages gain on four GPUs.

vLLM refuses to place several data-parallel ranks on one GPU by itself. Here each rank is a node of its own with one
engine, as its documentation describes for several machines; the first has the API server, which balances.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from part_options import options_of
from row_log import RowLog
from stand_ins import BENCHMARKS, SMALL, benchmarks_importable, device_memory_bytes, write_model

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.places import split_cores
from cascadeinfer.config.traces import load_trace
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.results.estimates import counted_rows, errors_by_kind, summarise_groups
from cascadeinfer.results.record_files import read_records
from cascadeinfer.results.summary import Slo

benchmarks_importable()

from processes import Service, client_first  # noqa: E402 - of benchmarks/peers
from workloads import Kind, Workload, write_trace  # noqa: E402

COMMAND: Final = [sys.executable, "-c", "from cascadeinfer.cli.main import main; main()"]
VLLM: Final = [sys.executable, str(BENCHMARKS / "peers" / "vllm_serve.py"), "serve"]
MODEL_NAME: Final = "bench"
READY_TIMEOUT_S: Final = 600.0
WARM_UP_REQUESTS: Final = 12
WARM_UP: Final = 0.1
"""Share of the requests that the figures exclude."""
KV_SHARE: Final = 0.1
"""Of the GPU's memory, for the KV cache of one instance."""
REFERENCE_MULTIPROCESSORS: Final = 132
"""Of the GPU that the rate is meant for (H100, H200); others get a rate in proportion."""
FIGURES: Final = (
    "ttft_s_mean", "ttft_s_p99", "tpot_s_mean", "tpot_s_p99", "e2e_s_mean", "e2e_s_p99", "throughput_tokens_per_s",
    "slo_attainment",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What is compared.

    Attributes:
        instances: Of each system.
        engine: vLLM's options, the same for all.
        stages: Of our server.
        long_tokens: Total length from which a request counts as long.
        rate_rps: Requests per second; on a GPU, of the reference.
        rounds: At most; as many as the time allows.
    """

    instances: int
    engine: tuple[str, ...]
    stages: str
    long_tokens: int
    workload: Workload
    rate_rps: float
    slo: Slo
    rounds: int


PLANS: Final = {
    "cuda": Plan(
        4,
        ("--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "40960", "--gpu-memory-utilization",
         "0.2"),  # the share is only checked: see `engine_words`
        "0-2048:2,2048-:2", 2048,
        Workload(
            (
                Kind("chat turn", 0.75, (64, 512), (64, 256)),
                Kind("long chat", 0.10, (2500, 6000), (128, 400)),
                Kind("document", 0.15, (12_000, 30_000), (64, 256)),
            ),
            requests=120,
        ),
        4.0,
        Slo(2.0, 0.05), 3,
    ),
    "cpu": Plan(
        2,
        ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--num-gpu-blocks-override", "128",
         "--block-size", "32"),
        "0-128:1,128-:1", 128,
        Workload((Kind("short", 0.75, (20, 60), (8, 16)), Kind("long", 0.25, (200, 400), (8, 16))), 8),
        1.0,
        Slo(10.0, 1.0), 1,
    ),
}  # fmt: skip
SYSTEMS: Final = ("cascadeinfer stages", "vllm data-parallel", "cascadeinfer least_loaded")


def scaled(plan: Plan, device: str) -> Plan:
    """The plan with a rate for this GPU, and requests for as long."""
    if device == "cpu":
        return plan
    import torch  # noqa: PLC0415 - only where there is a GPU

    share = torch.cuda.get_device_properties(0).multi_processor_count / REFERENCE_MULTIPROCESSORS
    workload = replace(plan.workload, requests=max(1, round(plan.workload.requests * share)))
    return replace(plan, workload=workload, rate_rps=plan.rate_rps * share)


def node_words(plan: Plan, number: int, rpc_port: int) -> list[str]:
    """Options of a node of vLLM's data parallelism."""
    words = [
        "--data-parallel-size", str(plan.instances), "--data-parallel-size-local", "1",
        "--data-parallel-address", LOOPBACK, "--data-parallel-rpc-port", str(rpc_port),
    ]  # fmt: skip
    return words if number == 0 else [*words, "--headless", "--data-parallel-start-rank", str(number)]


def engine_words(plan: Plan, device: str) -> list[str]:
    """
    Options of vLLM's for every engine of every system.

    On a GPU, the memory for KV is given: while it starts, an engine would count what its neighbours take as its own.
    """
    if device == "cpu":
        return list(plan.engine)
    return [*plan.engine, "--kv-cache-memory-bytes", str(int(KV_SHARE * device_memory_bytes()))]


@contextlib.contextmanager
def running(system: str, plan: Plan, device: str, model: Path, logs: Path) -> Iterator[str]:
    """A system, ready; yields its URL."""
    options = [str(model), "--served-model-name", MODEL_NAME, *engine_words(plan, device)]
    cores = split_cores(plan.instances, sorted(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:

        def start(name: str, command: list[str], port: int, **environment: str) -> Service:
            service = Service(name, command, port, logs / f"serving-{name.replace(' ', '-')}.log", environment)
            return stack.enter_context(service)

        port = free_port()
        if system == "vllm data-parallel":
            rpc_port = free_port()
            for number in reversed(range(plan.instances)):
                place = {"VLLM_CPU_OMP_THREADS_BIND": cores[number]} if device == "cpu" else {}
                entry = ["--host", LOOPBACK, "--port", str(port)] if number == 0 else []
                words = [*VLLM, *options, *node_words(plan, number, rpc_port), *entry]
                served = start(f"vllm-{number}", words, port, **place)
        else:
            policy = {"cascadeinfer stages": ["--stages", plan.stages]}.get(system, ["--policy", "least_loaded"])
            entry = ["--host", LOOPBACK, "--port", str(port), "--instances", str(plan.instances), *policy]
            served = start(system, [*COMMAND, "serve", *options, *entry], port)
        served.wait_ready("/health", READY_TIMEOUT_S)
        yield served.url


def bench(url: str, trace: Path, seed: int, *words: str) -> None:
    """Replay a trace; requests may fail, the generator may not."""
    command = [
        *COMMAND, "bench", "--url", url, "--trace", str(trace), "--model", MODEL_NAME, "--seed", str(seed),
        "--prompts", "text", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=client_first)
    if done.returncode not in {0, 1} or "Traceback" in done.stderr:
        sys.exit(f"bench ended with {done.returncode}:\n{done.stderr}")


def figures_of(file: Path, plan: Plan) -> dict[str, Any]:
    """Figures of a run, group by group; None where there is none."""
    run = read_records(file)
    counted = counted_rows(run.records, WARM_UP)
    found: dict[str, Any] = {"errors": errors_by_kind(run.errors)}
    for name, group in summarise_groups(counted, plan.slo, plan.long_tokens, np.random.default_rng(0)).items():
        values = {figure: group.figures[figure].value for figure in FIGURES}
        found[name] = {
            "requests": group.requests,
            "failed": group.failed,
            **{figure: value if math.isfinite(value) else None for figure, value in values.items()},
        }
    return found


def measure(options: argparse.Namespace, folder: Path, log: RowLog) -> None:
    """All systems in rotating order, round after round, while a round as long as the longest so far still fits."""
    plan = scaled(PLANS[options.device], options.device)
    model = folder / "model"
    if options.device == "cpu":
        make_tiny_llama(model)
    else:
        write_model(model, SMALL, own_tokens=False)
    begun_s, longest_s = time.monotonic(), 0.0
    for number in range(plan.rounds):
        turn_s = time.monotonic()
        if number and turn_s + longest_s > begun_s + options.seconds:
            return
        trace = folder / f"trace-{number}.jsonl"
        write_trace(plan.workload, number, plan.rate_rps, trace)
        for position in range(len(SYSTEMS)):
            turn = (position + number) % len(SYSTEMS)
            if not log.has(f"{SYSTEMS[turn]}, round {number}"):
                run_one(SYSTEMS[turn], turn, number, trace, options, plan, model, log)
        longest_s = max(longest_s, time.monotonic() - turn_s)


def run_one(
    system: str,
    turn: int,
    number: int,
    trace: Path,
    options: argparse.Namespace,
    plan: Plan,
    model: Path,
    log: RowLog,
) -> None:
    """One system, one round."""
    records = trace.with_name(f"{turn}-{number}.parquet")
    with running(system, plan, options.device, model, options.logs) as url:
        bench(url, trace, 10_000 + turn, "--requests", str(min(WARM_UP_REQUESTS, len(load_trace(trace)))))
        bench(
            url, trace, 100 * number + turn, "--label", system, "--out", str(records), "--long-tokens",
            str(plan.long_tokens), "--ttft-slo", str(plan.slo.ttft_s), "--tpot-slo", str(plan.slo.tpot_s),
        )  # fmt: skip
    log.add(f"{system}, round {number}", system=system, round=number, **figures_of(records, plan))


def main() -> None:
    """Measure."""
    options = options_of(__doc__)
    plan = scaled(PLANS[options.device], options.device)
    settings = {
        "instances": plan.instances, "engine": engine_words(plan, options.device), "stages": plan.stages,
        "seeds": "of a trace: its round",
        "kinds": [[k.name, k.share, k.prompt, k.output] for k in plan.workload.kinds],
        "rate_rps": plan.rate_rps, "requests": plan.workload.requests,
        "model": "tiny" if options.device == "cpu" else f"{SMALL.name}, with a vocabulary of 512",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, RowLog(options.rows, settings) as log:
        measure(options, Path(folder), log)


if __name__ == "__main__":
    main()
