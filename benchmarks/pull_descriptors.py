"""
What a pull costs by the number of its descriptors: the same tokens in blocks of different sizes.

    python benchmarks/pull_descriptors.py [--block-sizes 32,64,128] [--context 2000] [--layers 16] [--repetitions 20]

NIXL reads a KV cache by one descriptor per block and layer (or per part of it). vLLM's blocks have 16 tokens on GPUs
and 128 on CPUs, so a pull there has eight times the descriptors. For each block size two real vLLM instances run with a
tiny Llama of many layers (dummy weights: nobody reads its text). A repetition moves one request on each pair, in random
order, always from the first to the second instance: the first has the prompt in its prefix cache, the second caches
nothing and pulls all of it.

NIXL itself says how many descriptors a pull had, how long posting them took (in the engine's thread, so no step runs
meanwhile) and how long the whole transfer took, posting included. The pause is the time from the source's last token
to the target's first, as they arrive in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import measuring

if __name__ == "__main__":
    measuring.quiet_environment()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process per engine
    from llvmlite.binding import ffi

    # Engines are forked, to start in seconds. vLLM's CPU worker looks into every imported module; llvmlite's library
    # object would answer with a C function, and ends it.
    ffi.lib._fntab["__dict__"] = {}  # noqa: SLF001 - there is no other way
    from vllm.engine.arg_utils import AsyncEngineArgs

    from cascadeinfer.core.migration import ROOM_SLACK_TOKENS
    from cascadeinfer.engines.protocol import KvTicket, Resume
    from cascadeinfer.engines.vllm.configuration import KvTransferSettings
    from cascadeinfer.engines.vllm.instance import VllmInstance
    from cascadeinfer.engines.vllm.launch import make_factories
    from cascadeinfer.engines.vllm.plain_request import make_plain_request

TOKENS_BEFORE = 4
"""At the source before the cut."""
TOKENS_OUT = TOKENS_BEFORE + 8
COUNTS = ("descriptors", "kv_bytes")
FIGURES = ("post_s", "transfer_s", "pause_s")


@dataclass(slots=True)
class Pull:
    """One move: what NIXL says of its pull, and the arrival times of tokens."""

    descriptors: int = 0
    kv_bytes: int = 0
    post_s: float = 0.0
    transfer_s: float = 0.0
    left_s: float = 0.0
    arrived_s: float | None = None
    output: list[int] = field(default_factory=list)

    @property
    def pause_s(self) -> float:
        """Between the last token at the source and the first at the target."""
        assert self.arrived_s is not None, "no token came"
        return self.arrived_s - self.left_s

    def note(self, stats: dict[str, list[float]]) -> None:
        """Take what NIXL says of the pull."""
        for n_descriptors, n_bytes, post_s, transfer_s in zip(
            stats["num_descriptors"],
            stats["bytes_transferred"],
            stats["post_duration"],
            stats["transfer_duration"],
            strict=True,
        ):
            assert self.descriptors == 0, "one request, one pull"
            self.descriptors, self.kv_bytes = int(n_descriptors), int(n_bytes)
            self.post_s, self.transfer_s = post_s, transfer_s


async def move_once(source: VllmInstance, target: VllmInstance, request_id: str, prompt: list[int]) -> Pull:
    """One request that moves from the source to the target."""
    pull = Pull()
    request = make_plain_request(request_id, prompt, TOKENS_OUT)
    await source.add(request_id, request)
    ticket: KvTicket | None = None
    while ticket is None:
        for delta in (await source.next_outputs()).outputs:
            had, pull.left_s = len(pull.output), time.perf_counter()
            pull.output += delta.new_token_ids
            if had < TOKENS_BEFORE <= len(pull.output):
                refused = await target.reserve(request_id, len(prompt) + len(pull.output) + ROOM_SLACK_TOKENS)
                refused = refused or await source.cut(request_id)
                assert refused is None, refused
            if delta.finish_reason is not None:
                ticket = source.ticket_of(delta)
                assert ticket is not None, "it ended before the cut"
    await target.add(f"{request_id}~1", request, Resume(pull.output, ticket, request_id))
    ended = False
    while not ended or not pull.descriptors:
        outputs = await target.next_outputs()
        if outputs.scheduler_stats is not None and outputs.scheduler_stats.kv_connector_stats:
            pull.note(outputs.scheduler_stats.kv_connector_stats)
        for delta in outputs.outputs:
            if pull.arrived_s is None and delta.new_token_ids:
                pull.arrived_s = time.perf_counter()
            ended |= delta.finish_reason is not None
    return pull


def pair(arguments: dict[str, Any], block_tokens: int, max_tokens: int) -> list[VllmInstance]:
    """Source and target with blocks of this size and the same number of tokens in all of them; not started."""
    args = AsyncEngineArgs(
        **{**arguments, "block_size": block_tokens, "num_gpu_blocks_override": 1 + 2 * max_tokens // block_tokens}
    )
    instances = []
    for end, caches in (("source", True), ("target", False)):
        name = f"{end}{block_tokens}"
        own = dataclasses.replace(args, enable_prefix_caching=caches)
        fork = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
        made = make_factories(own, (name,), KvTransferSettings(), log_stats=True, extra_environment=fork)
        instances.append(made[name](0))
    return instances


async def measure(pairs: dict[int, list[VllmInstance]], context: int, repetitions: int) -> list[dict[str, Any]]:
    """All repetitions; one row per block size, ratios to the largest."""
    rng = np.random.default_rng(0)
    prompt = measuring.random_prompt(rng, context)
    pulls: dict[int, list[Pull]] = {size: [] for size in pairs}
    for repetition in range(-2, repetitions):  # the first ones fill the source's prefix cache and warm up
        for size in rng.permutation(list(pairs)):
            pull = await move_once(*pairs[size], f"{size}-{repetition}", prompt)
            if repetition >= 0:
                pulls[size].append(pull)
    largest = max(pairs)
    rows = []
    for size, those in pulls.items():
        row: dict[str, Any] = {"block_tokens": size}
        for name in COUNTS:  # they vary a little: a cut takes effect a token sooner or later
            row[name] = {"median": float(np.median(counts := [getattr(pull, name) for pull in those]))}
            row[name] |= {"least": min(counts), "most": max(counts)}
        for name in FIGURES:
            values = [getattr(pull, name) for pull in those]
            ratios = [a / getattr(b, name) for a, b in zip(values, pulls[largest], strict=True)]
            row[name] = measuring.median_with_spread(values, rng)
            row[f"{name[:-2]}_over_largest"] = measuring.median_with_spread(ratios, rng)
        rows.append(row)
    return rows


async def run_all(sizes: list[int], context: int, layers: int, repetitions: int) -> list[dict[str, Any]]:
    """Start all pairs, measure, stop them."""
    with tempfile.TemporaryDirectory() as folder:
        max_tokens = 2 * context
        arguments = measuring.tiny_engine_args(Path(folder), max_model_tokens=max_tokens, kv_blocks=0)
        arguments |= {
            "distributed_executor_backend": "uni",
            "hf_overrides": {"num_hidden_layers": layers},
            "load_format": "dummy",
        }
        pairs = {size: pair(arguments, size, max_tokens) for size in sizes}
        everyone = [instance for two in pairs.values() for instance in two]
        try:
            for source, target in pairs.values():  # not all at once: memory and time for two are enough
                await asyncio.gather(source.start(), target.start())
                await target.connect([source])
            return await measure(pairs, context, repetitions)
        finally:
            await asyncio.gather(*(instance.stop(5.0) for instance in everyone))


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table: medians with their 95 % intervals."""

    def cell(spread: dict[str, Any], scale: float) -> str:
        low, high = spread["median_low"] * scale, spread["median_high"] * scale
        return f"{spread['median'] * scale:.2f} [{low:.2f}, {high:.2f}]"

    names = [name[:-2] for name in FIGURES]
    print(
        "| block | descriptors | MiB |", " | ".join([*(f"{n} ms" for n in names), *(f"{n}, ratio" for n in names)]), "|"
    )
    print("|---" * (3 + 2 * len(names)) + "|")
    for row in rows:
        cells = [cell(row[name], 1e3) for name in FIGURES] + [cell(row[f"{n}_over_largest"], 1.0) for n in names]
        print(
            "|", row["block_tokens"], f"| {row['descriptors']['median']:.0f} |",
            f"{row['kv_bytes']['median'] / 2**20:.1f} |",
            " | ".join(cells), "|",
        )  # fmt: skip


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--block-sizes", default="32,64,128", help="in tokens; vLLM's CPU attention takes multiples of 32"
    )
    parser.add_argument("--context", type=int, default=2000, help="prompt length in tokens")
    parser.add_argument("--layers", type=int, default=16, help="of the model")
    parser.add_argument("--repetitions", type=int, default=20, help="moves per block size")
    parser.add_argument("--name", default="pull_descriptors", help="of the file of results")
    options = parser.parse_args()
    sizes = [int(size) for size in options.block_sizes.split(",")]
    host = measuring.machine()
    rows = asyncio.run(run_all(sizes, options.context, options.layers, options.repetitions))
    show(rows)
    settings = {"context_tokens": options.context, "layers": options.layers, "repetitions": options.repetitions}
    print(measuring.write_results(options.name, host, settings, rows))


if __name__ == "__main__":
    main()
