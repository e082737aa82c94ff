"""
Capacity of one and of several front-end processes: `cascadeinfer serve --api-servers M` and `vllm serve
--api-server-count M`.

    python benchmarks/front_end_scale.py [--rounds 2] [--samples 4] [--requests 64] [--tokens 200]
        [--prefix "flock /tmp/lock"]

Both serve the tiny model with two engines and stream completions over HTTP, each request on its own connection. On a
machine with few cores the engines and the load generator take most of them, so tokens per second of wall time say
little about the front end. The CPU time of the front-end processes per token does (everything the server has started
except the engines; vLLM's coordinator is part of its front end): its inverse is what a front-end process carries with a
core to itself, which is how it should be run. Here the whole front end has the first core to itself, and engines and
load share the others, because a process that is interrupted at every token takes more time for the same work. Both
figures are reported.

Every start of a side is a separate process; sides take turns in each round, in rotating order. Ratios are ours over
vLLM's with the same number of processes, sample by sample within a round.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

import measuring
from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.places import split_cores
from cascadeinfer.engines.vllm.connector.cores import NAP_S
from cascadeinfer.loadgen.served_process import ServedProcess, ServerFailedError

N_INSTANCES = 2
PROCESSES = (1, 2)
SIDES = tuple(f"{system}-{n}" for n in PROCESSES for system in ("cascadeinfer", "vllm"))
MODEL = "tiny"
PROMPT_TOKENS = 64
MAX_MODEL_TOKENS = 2048
KV_BLOCKS = 2048
MAX_NUM_SEQS = 64
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 60.0
FIGURES = ("front_end_cpu_us_per_token", "tokens_per_front_end_core_s", "tokens_per_s")
VLLM_SERVE = Path(__file__).parent / "peers" / "vllm_serve.py"


def command_of(side: str, folder: Path, port: int) -> list[str]:
    """The server of a side."""
    system, n_processes = side.split("-")
    arguments = measuring.tiny_engine_args(folder, max_model_tokens=MAX_MODEL_TOKENS, kv_blocks=KV_BLOCKS)
    words = [
        "serve", arguments["model"], "--served-model-name", MODEL, "--host", LOOPBACK, "--port", str(port),
        "--dtype", arguments["dtype"], "--block-size", str(arguments["block_size"]), "--enforce-eager",
        "--max-model-len", str(MAX_MODEL_TOKENS), "--num-gpu-blocks-override", str(KV_BLOCKS),
        "--max-num-seqs", str(MAX_NUM_SEQS), "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if system == "vllm":
        words += ["--data-parallel-size", str(N_INSTANCES), "--api-server-count", n_processes]
        return [sys.executable, str(VLLM_SERVE), *words]
    words += ["--instances", str(N_INSTANCES), "--api-servers", n_processes, "--policy", "least_loaded"]
    return [sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", *words]


def environment_of(side: str) -> dict[str, str]:
    """
    The extra environment of a side's server: vLLM's engines get the cores that ours pick by themselves, and sleep while
    they wait, as ours do.
    """
    if not side.startswith("vllm"):
        return {}
    cores = "|".join(split_cores(N_INSTANCES, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_OMP_THREADS_BIND": cores, "PEERS_NAP_S": str(NAP_S)}


def front_end_of(server: psutil.Process) -> list[psutil.Process]:
    """The server and all processes that it has started, except engines."""
    everyone = [server, *server.children(recursive=True)]
    engines = [process for process in everyone if "EngineCore" in " ".join(process.cmdline())]
    inside = {process.pid for engine in engines for process in (engine, *engine.children(recursive=True))}
    return [process for process in everyone if process.pid not in inside]


def front_end_cpu_s(server: psutil.Process) -> float:
    """CPU time of the front end so far."""
    return sum(sum(process.cpu_times()[:2]) for process in front_end_of(server))


def set_apart(server: psutil.Process) -> None:
    """
    Give the first core to the front end, and the others to the engines and the load (this process); does nothing with
    one core.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return
    front_end = {process.pid for process in front_end_of(server)}
    for process in [server, *server.children(recursive=True)]:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {first} if process.pid in front_end else others)
    os.sched_setaffinity(0, others)


async def load(url: str, n_requests: int, n_tokens: int, rng: np.random.Generator) -> None:
    """All requests at once, streamed, each on its own connection; every one must return all its tokens."""
    body = {"model": MODEL, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> int:
        last = b""
        async with session.post(f"{url}/v1/completions", json={**body, "prompt": prompt}) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = line
        return int(json.loads(last[6:])["usage"]["completion_tokens"])

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        prompts = [measuring.random_prompt(rng, PROMPT_TOKENS) for _ in range(n_requests)]
        n_out = sum(await asyncio.gather(*(one(session, prompt) for prompt in prompts)))
    assert n_out == n_requests * n_tokens, f"{n_out} tokens came"


def all_serve(server: ServedProcess, side: str) -> bool:
    """Whether all of our processes are ready; vLLM's listen only when all are."""
    if not server.answers("/v1/models"):
        return False
    if side.startswith("vllm") or side.endswith("-1"):
        return True
    return all(one["up"] for one in json.loads(server.page("/admin/instances"))["front_ends"])


def sample_side(side: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Start a side, warm up, sample."""
    rng = np.random.default_rng(0)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        server = ServedProcess(
            command_of(side, Path(folder) / "model", port),
            port=port,
            log=Path(folder) / "log",
            environment=environment_of(side),
            own_session=False,  # the load generator shares the cores with it
            stop_timeout_s=STOP_TIMEOUT_S,
        )
        try:
            with server:
                server.wait_until(lambda: all_serve(server, side), "serving", START_TIMEOUT_S, poll_s=0.5)
                root = psutil.Process(server.pid)
                set_apart(root)
                for _ in range(2):
                    asyncio.run(load(server.url, options.requests, options.tokens, rng))
                return [one_sample(server.url, root, options, rng) for _ in range(options.samples)]
        except ServerFailedError as error:
            sys.exit(str(error))
        except BaseException:
            sys.stderr.write(server.log_tail())
            raise


def one_sample(
    url: str, server: psutil.Process, options: argparse.Namespace, rng: np.random.Generator
) -> dict[str, float]:
    """Figures of one load."""
    wall_s, cpu_s = time.perf_counter(), front_end_cpu_s(server)
    asyncio.run(load(url, options.requests, options.tokens, rng))
    wall_s, cpu_s = time.perf_counter() - wall_s, front_end_cpu_s(server) - cpu_s
    n_tokens = options.requests * options.tokens
    return {
        "front_end_cpu_us_per_token": cpu_s / n_tokens * 1e6,
        "tokens_per_front_end_core_s": n_tokens / cpu_s,
        "tokens_per_s": n_tokens / wall_s,
    }


def compare(rounds: list[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Per figure: each side, and per number of processes the ratio ours over vLLM's."""
    rng = np.random.default_rng(1)
    figures: dict[str, Any] = {}
    for figure in FIGURES:
        values = {side: [sample[figure] for one in rounds for sample in one[side]] for side in SIDES}
        figures[figure] = {side: measuring.median_with_spread(values[side], rng) for side in SIDES}
        for n in PROCESSES:
            pairs = zip(values[f"cascadeinfer-{n}"], values[f"vllm-{n}"], strict=True)
            figures[figure][f"ratio-{n}"] = measuring.median_with_spread([ours / theirs for ours, theirs in pairs], rng)
    return figures


def show(figures: dict[str, Any]) -> None:
    """A table on standard output."""
    print("| figure | processes | cascadeinfer | vllm | ratio: median [95 %] | 10-90 % |")
    print("|---|---|---|---|---|---|")
    for name, figure in figures.items():
        for n in PROCESSES:
            ratio = figure[f"ratio-{n}"]
            print(
                f"| {name} | {n} | {figure[f'cascadeinfer-{n}']['median']:.1f} | {figure[f'vllm-{n}']['median']:.1f} "
                f"| {ratio['median']:.3f} [{ratio['median_low']:.3f}, {ratio['median_high']:.3f}] "
                f"| {ratio['p10']:.3f}-{ratio['p90']:.3f} |"
            )


def main() -> None:
    """Parse the options; the parent runs the rounds, a child one side."""
    parser = measuring.sides_parser(__doc__, SIDES, name="front_end_scale", rounds=2, samples=4, requests=64)
    parser.add_argument("--prefix", default="", help="command under which each side is started, such as a lock")
    options = parser.parse_args()
    measuring.quiet_environment()
    if options.side is not None:
        measuring.print_samples(sample_side(options.side, options))
        return
    host = measuring.machine()
    start = partial(measuring.run_in_own_process, __file__, options=options, prefix=shlex.split(options.prefix))
    rounds = measuring.rotating_rounds(SIDES, options.rounds, start)
    figures = compare(rounds)
    show(figures)
    settings = {key: getattr(options, key) for key in ("rounds", "samples", "requests", "tokens")} | {
        "prompt_tokens": PROMPT_TOKENS, "instances": N_INSTANCES, "max_num_seqs": MAX_NUM_SEQS,
    }  # fmt: skip
    print(measuring.write_results(options.name, host, settings, {"figures": figures, "rounds": rounds}))


if __name__ == "__main__":
    main()
