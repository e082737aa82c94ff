"""
The cost of our engine client compared with vLLM's own: two instances behind `AsyncLLM`, ours against
`data_parallel_size=2`.

Three sides show where a difference comes from:

- `cascadeinfer`: our client and runtime, `round_robin`, our KV connector loaded, load reports on; no request moves.
- `vllm_dp`: vLLM's data parallelism as one would run it, without a KV connector.
- `vllm_dp_nixl`: the same with NIXL's own connector loaded and idle, which is what any live migration over NIXL has to
  pay in the engine.

    python benchmarks/client_overhead.py [--rounds 3] [--requests 48] [--tokens 200] [--name client_overhead]

Each round starts every side in a separate process, in rotating order, so that a machine that gets busier or slower
affects all of them. A process warms up, then takes several samples of the same load: requests as token ids, all at
once, greedy, of fixed length, streamed through `AsyncLLM.generate` with detokenisation. Model, dtype, block size,
blocks, eager execution and the cores of each engine are the same; statistics are on, as in a server.

Each sample has three figures: tokens per second of wall time (engines and client share the cores); CPU time of the
client's process per token; and its work per token, which is the CPU time in units of a fixed piece of Python that runs
in between, on the same core at the same time. CPU time alone also compares the sides' engines: where two of the
machine's cores are two threads of one core, which a virtual machine need not reveal, everything takes longer beside an
engine that computes than beside one that spins in `sched_yield`. Ratios are ours over the other side's, sample by
sample within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import measuring

if __name__ == "__main__":
    # The engines' processes import this file again (spawn) and need none of it; numba, which the planner brings in,
    # would even end vLLM's CPU worker: it looks into every loaded module, and llvmlite's answers any name.
    measuring.quiet_environment()
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from cascadeinfer.assemble import make_runtime
    from cascadeinfer.cluster.local import LOOPBACK, free_port
    from cascadeinfer.cluster.places import split_cores
    from cascadeinfer.config.schema import ServeOptions
    from cascadeinfer.engines.vllm.configuration import CPU_UCX_TRANSPORTS
    from cascadeinfer.frontend.running import running_llm

OURS = "cascadeinfer"
OTHERS = ("vllm_dp", "vllm_dp_nixl")
SIDES = (OURS, *OTHERS)
N_INSTANCES = 2
PROMPT_TOKENS = 64
MAX_MODEL_TOKENS = 2048
KV_BLOCKS = 2048
MAX_NUM_SEQS = 64
START_TIMEOUT_S = 900
YARDSTICK_INTERVAL_S = 0.01
FIGURES = ("tokens_per_s", "client_cpu_us_per_token", "client_work_per_token")


@contextlib.asynccontextmanager
async def running(side: str, folder: Path) -> AsyncIterator[Any]:
    """An `AsyncLLM` over two engines of the tiny model, with either side's client."""
    arguments = measuring.tiny_engine_args(folder, max_model_tokens=MAX_MODEL_TOKENS, kv_blocks=KV_BLOCKS)
    arguments["max_num_seqs"] = MAX_NUM_SEQS
    if side == OURS:
        options = ServeOptions(instances=N_INSTANCES, policy="round_robin")
        async with running_llm(make_runtime(AsyncEngineArgs(**arguments), options)) as llm:
            yield llm
        return
    cores = split_cores(N_INSTANCES, sorted(os.sched_getaffinity(0)))  # what ours gives each instance
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    if side == "vllm_dp_nixl":
        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cpu"
        )
        os.environ |= {"UCX_TLS": CPU_UCX_TRANSPORTS, "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK}
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_ports_in_a_row(N_INSTANCES))
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, data_parallel_size=N_INSTANCES))
    try:
        yield llm
    finally:
        llm.shutdown()


def free_ports_in_a_row(n_ports: int) -> int:
    """The first of several consecutive free ports: vLLM adds the rank to the one it is given."""
    while True:
        first = free_port()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + n_ports):
                stack.enter_context(socket.socket()).bind((LOOPBACK, port))
            return first


def yardstick_s() -> float:
    """CPU seconds of a fixed piece of Python, about 0.1 ms: the current speed of this core."""
    begun_s = time.thread_time()
    table: dict[int, str] = {}
    for number in range(500):
        table[number & 255] = str(number)
    return time.thread_time() - begun_s


@contextlib.asynccontextmanager
async def measured_yardsticks() -> AsyncIterator[list[float]]:
    """Takes yardsticks one after another while the block runs."""
    taken: list[float] = []

    async def take() -> None:
        while True:
            taken.append(yardstick_s())
            await asyncio.sleep(YARDSTICK_INTERVAL_S)

    task = asyncio.create_task(take())
    try:
        yield taken
    finally:
        task.cancel()


async def load(llm: Any, n_requests: int, n_tokens: int, rng: np.random.Generator, tag: str) -> dict[str, float]:
    """One sample: all requests at once, all tokens streamed; returns its figures."""
    parameters = SamplingParams(
        temperature=0, max_tokens=n_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def one(number: int, prompt: list[int]) -> int:
        return sum(
            [
                len(output.outputs[0].token_ids)
                async for output in llm.generate({"prompt_token_ids": prompt}, parameters, f"{tag}-{number}")
            ]
        )

    prompts = [measuring.random_prompt(rng, PROMPT_TOKENS) for _ in range(n_requests)]
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    async with measured_yardsticks() as yardsticks:
        n_out = sum(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    assert n_out == n_requests * n_tokens, f"{n_out} tokens came"
    cpu_s -= sum(yardsticks)
    return {
        "tokens_per_s": n_out / wall_s,
        "client_cpu_us_per_token": cpu_s / n_out * 1e6,
        "client_work_per_token": cpu_s / n_out / float(np.mean(yardsticks)),
    }


async def sample_side(side: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Start a side, warm up, sample."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        async with running(side, Path(folder)) as llm:
            await load(llm, options.requests, options.tokens, rng, "warm")
            return [
                await load(llm, options.requests, options.tokens, rng, f"sample{i}") for i in range(options.samples)
            ]


def compare(rounds: list[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Per figure: each side, and for each other side the ratio of ours to it, sample by sample within a round."""
    rng = np.random.default_rng(1)
    figures: dict[str, Any] = {}
    for figure in FIGURES:
        values = {side: [sample[figure] for one in rounds for sample in one[side]] for side in SIDES}
        figures[figure] = {side: measuring.median_with_spread(values[side], rng) for side in SIDES}
        for other in OTHERS:
            ratios = [ours / theirs for ours, theirs in zip(values[OURS], values[other], strict=True)]
            figures[figure][f"over_{other}"] = measuring.median_with_spread(ratios, rng) | {
                "per_round": [float(np.median(part)) for part in np.array_split(ratios, len(rounds))]
            }
    return figures


def show(figures: dict[str, Any]) -> None:
    """A table on standard output."""
    print("| figure | side | median | ours over it: median [95 %] | 10-90 % | per round |")
    print("|---|---|---|---|---|---|")
    for name, figure in figures.items():
        print(f"| {name} | {OURS} | {figure[OURS]['median']:.4g} | | | |")
        for other in OTHERS:
            ratio = figure[f"over_{other}"]
            print(
                f"| {name} | {other} | {figure[other]['median']:.4g} "
                f"| {ratio['median']:.3f} [{ratio['median_low']:.3f}, {ratio['median_high']:.3f}] "
                f"| {ratio['p10']:.3f}-{ratio['p90']:.3f} | {', '.join(f'{r:.3f}' for r in ratio['per_round'])} |"
            )


def main() -> None:
    """Parse the options; the parent runs the rounds, a child one side."""
    parser = measuring.sides_parser(__doc__, SIDES, name="client_overhead", rounds=3, samples=5, requests=48)
    options = parser.parse_args()
    if options.side is not None:
        measuring.print_samples(asyncio.run(sample_side(options.side, options)))
        return
    host = measuring.machine()
    start = partial(measuring.run_in_own_process, __file__, options=options, timeout_s=START_TIMEOUT_S)
    rounds = measuring.rotating_rounds(SIDES, options.rounds, start)
    figures = compare(rounds)
    show(figures)
    settings = {
        "rounds": options.rounds, "samples": options.samples, "requests": options.requests, "tokens": options.tokens,
        "prompt_tokens": PROMPT_TOKENS, "instances": N_INSTANCES, "max_num_seqs": MAX_NUM_SEQS,
    }  # fmt: skip
    print(measuring.write_results(options.name, host, settings, {"figures": figures, "rounds": rounds}))


if __name__ == "__main__":
    main()
