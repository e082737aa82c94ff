"""
An instance that is stopped nine tenths of the time: what share of the requests does it get, and what does that cost?

    python benchmarks/slow_instance.py [--source LABEL=SRC_FOLDER ...] [--rounds 2] [--requests 80] [--gap-s 0.5]
        [--name slow_instance]

Real servers, one after the other in rotating order, one per source tree: three instances of the tiny model in one
stage. Each serves the same requests twice, in open loop with the same exponential gaps: first with all instances well,
then with one of them under SIGSTOP for 0.9 s of every second. To compare source trees, run `--source now=src --source
before=/path/to/an/older/checkout/src`; only ratios count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import measuring
from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.loadgen.served_process import ServedProcess, ServerFailedError

N_INSTANCES = 3
N_TOKENS = 100
PROMPT_TOKENS = 40
STOPPED_S, RUNNING_S = 0.9, 0.1
READY_S = 300.0
MODEL = "tiny"
SICK = "0"


def server_of(source: Path, folder: Path) -> ServedProcess:
    """`cascadeinfer serve` from one source tree."""
    port = free_port()
    arguments = measuring.tiny_engine_args(folder / "model", max_model_tokens=1024, kv_blocks=256)
    words = [
        "serve", arguments["model"], "--host", LOOPBACK, "--port", str(port), "--served-model-name", MODEL,
        "--instances", str(N_INSTANCES), "--stages", f"0-:{N_INSTANCES}", "--dtype", "float32", "--enforce-eager",
        "--block-size", str(measuring.BLOCK_TOKENS), "--num-gpu-blocks-override", "256", "--max-model-len", "1024",
    ]  # fmt: skip
    return ServedProcess(
        [sys.executable, "-c", "from cascadeinfer.cli.main import main; raise SystemExit(main())", *words],
        port=port,
        log=folder / "log",
        environment={"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"},
        own_session=False,  # the load generator shares the cores with it
        stop_timeout_s=60.0,
    )


def all_are_up(server: ServedProcess) -> bool:
    """Whether every instance is up."""
    return server.answers("/health/ready") and len(json.loads(server.page("/health/ready"))["instances"]) == N_INSTANCES


async def pid_of_sick(http: httpx.AsyncClient) -> int:
    """Id of the process that will be stopped."""
    instances = (await http.get("/admin/instances")).json()["instances"]
    return next(int(instance["pid"]) for instance in instances if instance["id"] == SICK)


async def ended(http: httpx.AsyncClient) -> dict[str, float]:
    """Requests that have ended, per instance."""
    found: dict[str, float] = {}
    for line in (await http.get("/metrics")).text.splitlines():
        if match := re.match(r'vllm:request_success_total\{.*engine="(\w+)".*\} (\S+)', line):
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


async def make_sick(pid: int) -> None:
    """Stop and continue the process until cancelled."""
    try:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(RUNNING_S)
    finally:
        os.kill(pid, signal.SIGCONT)


async def phase(http: httpx.AsyncClient, rng: np.random.Generator, n_requests: int, gap_s: float) -> dict[str, float]:
    """Send the requests in open loop; latencies in seconds, and the share of the instance that is or will be sick."""
    before, latencies = await ended(http), []

    async def one(prompt: list[int]) -> None:
        begun_s = time.monotonic()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
        response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        latencies.append(time.monotonic() - begun_s)

    async with asyncio.TaskGroup() as group:
        for gap in rng.exponential(gap_s, n_requests):
            group.create_task(one(measuring.random_prompt(rng, PROMPT_TOKENS)))
            await asyncio.sleep(gap)
    after = await ended(http)
    grown = {name: count - before.get(name, 0.0) for name, count in after.items()}
    p50, p90, p99 = (float(p) for p in np.percentile(latencies, (50, 90, 99)))
    return {"p50_s": p50, "p90_s": p90, "p99_s": p99, "share": grown.get(SICK, 0.0) / sum(grown.values())}


async def both_phases(url: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """All instances well, then one sick, with the same requests and gaps."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=httpx.Limits()) as http:
        await phase(http, np.random.default_rng(0), 10, options.gap_s)  # the first ones warm up
        well = await phase(http, np.random.default_rng([1, number]), options.requests, options.gap_s)
        sick = asyncio.create_task(make_sick(await pid_of_sick(http)))
        try:
            ill = await phase(http, np.random.default_rng([2, number]), options.requests, options.gap_s)
        finally:
            sick.cancel()
            await asyncio.gather(sick, return_exceptions=True)
    return {"all well": well, "one sick": ill}


def measure(source: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One server, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder, server_of(source, Path(folder)) as server:
        server.wait_until(lambda: all_are_up(server), "all instances up", READY_S)
        return asyncio.run(both_phases(server.url, number, options))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", metavar="LABEL=SRC_FOLDER", help="source trees to compare")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=80, help="in each phase")
    parser.add_argument("--gap-s", type=float, default=0.5, help="mean time between two of them")
    parser.add_argument("--name", default="slow_instance", help="of the file of results")
    options = parser.parse_args()
    own = Path(__file__).parent.parent / "src"
    sources = dict(named.split("=", 1) for named in options.source or [f"now={own}"])
    measuring.quiet_environment()
    host, rounds = measuring.machine(), []
    for number in range(options.rounds):
        labels = list(sources)[number % len(sources) :] + list(sources)[: number % len(sources)]
        try:
            rounds.append({label: measure(Path(sources[label]), number, options) for label in labels})
        except ServerFailedError as error:
            sys.exit(str(error))
        for label in sources:
            print(number, label, rounds[-1][label])
    settings = {"requests": options.requests, "gap_s": options.gap_s, "sources": list(sources)}
    print(measuring.write_results(options.name, host, settings, rounds))


if __name__ == "__main__":
    main()
