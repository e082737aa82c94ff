"""
How long a request pauses when it moves, compared with the time between its tokens: pre-copy, a pull of everything, and
recompute.

    python benchmarks/migration_pause.py [--contexts 200,1000,4000,8000] [--repetitions 15] [--wide]
        [--name migration_pause]

Two real vLLM instances with the tiny model, nothing else running. `--wide` gives it random weights and a KV cache ten
times as large per token (16 KiB), so that a pull takes its time. A repetition is one request: some tokens on the
source, room reserved at the target, a cut, the rest at the target. The ways: the full blocks are copied before the cut,
and the rest is pulled; everything is pulled after the cut; everything is recomputed. The ways alternate, in random
order, and so do the directions, so that all see the same machine. Every prompt is new, so that no prefix cache helps.

The pause is the time from the source's last token to the target's first, as they arrive in the front end. The time
between tokens is the median before anything of the move began, of the same request; while the copy runs, there is
another median. The runtime's own work (policy, streams) is excluded; it takes microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import measuring

if multiprocessing.parent_process() is None:
    # The engines' processes import this file again (spawn) and need none of it.
    measuring.quiet_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams

    from cascadeinfer.core.migration import ROOM_SLACK_TOKENS
    from cascadeinfer.engines.protocol import EngineRequest, KvTicket, Resume
    from cascadeinfer.engines.vllm.configuration import KvTransferSettings
    from cascadeinfer.engines.vllm.instance import VllmInstance
    from cascadeinfer.engines.vllm.launch import make_factories
    from cascadeinfer.engines.vllm.plain_request import request_with

TOKENS_BEFORE = 24
"""Tokens at the source before the move begins; enough for a median of the time between tokens."""
TOKENS_MEANWHILE = 300
"""Tokens at the source from then on, at most; it gets many while its blocks are copied."""
COPY_WITHIN_S = 20.0
TOKENS_AFTER = 8
ENDED_EARLY_MAX = 50
"""Requests of one context length that may end before their cut; none does on a machine that is not busy."""
MAX_MODEL_TOKENS = 8192  # as many positions as the tiny model has
KV_BLOCKS = 512
WIDE_KV_BLOCKS = 560
WIDE = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 128}
"""Of the wide model: 4 layers x 2 x 4 heads x 128 x 4 bytes = 16 KiB per token."""
WAYS = ("precopy", "pull", "recompute")


@dataclass(slots=True)
class Run:
    """
    One request's arrival times in seconds: at the source, at the target.

    Attributes:
        n_full: Tokens that were copied before the cut.
    """

    request: EngineRequest
    source_s: list[float]
    target_s: list[float]
    output: list[int]
    n_full: int = 0


def request_of(request_id: str, prompt: list[int]) -> EngineRequest:
    """A greedy request with more tokens than are measured."""
    n_tokens = TOKENS_BEFORE + TOKENS_MEANWHILE + TOKENS_AFTER
    sampling = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True)
    sampling.update_from_generation_config({}, None)
    return request_with(request_id, prompt, sampling)


async def run_once(
    source: VllmInstance, target: VllmInstance, request_id: str, prompt: list[int], way: str
) -> Run | None:
    """One request that moves once, in one of the ways; None if it ended before the cut reached its engine."""
    run = Run(request_of(request_id, prompt), [], [], [])
    await source.add(request_id, run.request)
    ticket: KvTicket | None = None
    leaving: asyncio.Task[None] | None = None
    while ticket is None:
        for delta in (await source.next_outputs()).outputs:
            run.source_s += [time.perf_counter()] * len(delta.new_token_ids)
            run.output += delta.new_token_ids
            if len(run.source_s) == TOKENS_BEFORE:
                leaving = asyncio.create_task(leave(source, target, request_id, run, way))
            if delta.finish_reason is not None and (ticket := source.ticket_of(delta)) is None:
                assert leaving is not None
                await leaving
                await target.release_reservation(request_id)
                return None
    assert leaving is not None
    await leaving
    if way == "recompute":
        await source.release_pin(request_id)
        ticket = None
    moved_id = f"{request_id}~1"
    await target.add(moved_id, run.request, Resume(run.output, ticket, request_id))
    while len(run.target_s) < TOKENS_AFTER:
        for delta in (await target.next_outputs()).outputs:
            if delta.request_id == moved_id:
                run.target_s += [time.perf_counter()] * len(delta.new_token_ids)
    await target.abort([moved_id])
    return run


async def leave(source: VllmInstance, target: VllmInstance, request_id: str, run: Run, way: str) -> None:
    """Ask for room, copy ahead if that is the way, and cut."""
    n_tokens = len(run.request.prompt_token_ids) + len(run.output)
    refused = await target.reserve(request_id, n_tokens + ROOM_SLACK_TOKENS + TOKENS_MEANWHILE)
    assert refused is None, refused
    if way == "precopy":
        full = await source.pin_full_blocks(request_id)
        assert full is not None
        assert await target.precopy(request_id, full, time.monotonic() + COPY_WITHIN_S)
        run.n_full = full.n_tokens
    refused = await source.cut(request_id)
    assert refused in {None, "ending", "unknown"}, refused
    if way == "precopy":
        await source.release_full_blocks(request_id)


async def measure(instances: list[VllmInstance], context: int, repetitions: int, seed: int) -> dict[str, Any]:
    """All repetitions for one context length, all ways; times in seconds."""
    rng = np.random.default_rng(seed)
    pauses: dict[str, list[float]] = {way: [] for way in WAYS}
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    gaps: list[float] = []
    copying_gaps: list[float] = []
    ended_early = 0
    for repetition in range(-1, repetitions):  # the first round warms up and is not counted
        for turn, way in enumerate(rng.permutation(WAYS)):
            source, target = instances if (repetition + turn) % 2 else reversed(instances)
            before = (await target.report())[1]
            run = None
            while run is None:  # a front end that had to wait for a core repeats the request, with another prompt
                assert ended_early < ENDED_EARLY_MAX, "the front end is too slow for these engines"
                request_id = f"{context}-{repetition}-{way}-{ended_early}"
                run = await run_once(source, target, request_id, measuring.random_prompt(rng, context), str(way))
                ended_early += run is None
            after = (await target.report())[1]
            pulled, copied = after.pulls - before.pulls, after.precopied_tokens - before.precopied_tokens
            assert copied == run.n_full, f"{copied} tokens were used of {run.n_full} that were copied"
            assert pulled == (way != "recompute"), f"{pulled} pulls in a run meant to {way}"
            if repetition < 0:
                continue
            gap_s = float(np.median(np.diff(run.source_s[:TOKENS_BEFORE])))
            if way == "precopy":
                copying_gaps.append(float(np.median(np.diff(run.source_s[TOKENS_BEFORE - 1 :]))) / gap_s)
            pause_s = run.target_s[0] - run.source_s[-1]
            gaps.append(gap_s)
            pauses[way].append(pause_s)
            ratios[way].append(pause_s / gap_s)
    return {
        "context_tokens": context,
        "ended_early": ended_early,
        "gap_s": measuring.median_with_spread(gaps, rng),
        **{f"{way}_pause_s": measuring.median_with_spread(pauses[way], rng) for way in WAYS},
        **{f"{way}_over_gap": measuring.median_with_spread(ratios[way], rng) for way in WAYS},
        "copying_gap_over_gap": measuring.median_with_spread(copying_gaps, rng),
        **{
            f"{way}_over_pull": measuring.median_with_spread(
                [a / b for a, b in zip(pauses[way], pauses["pull"], strict=True)], rng
            )
            for way in ("precopy", "recompute")
        },
    }


async def run_all(contexts: list[int], repetitions: int, *, wide: bool) -> list[dict[str, Any]]:
    """Start two instances, measure, stop them."""
    with tempfile.TemporaryDirectory() as folder:
        kv_blocks = WIDE_KV_BLOCKS if wide else KV_BLOCKS
        arguments = measuring.tiny_engine_args(Path(folder), max_model_tokens=MAX_MODEL_TOKENS, kv_blocks=kv_blocks)
        if wide:
            arguments |= {"load_format": "dummy", "hf_overrides": WIDE}
        factories = make_factories(AsyncEngineArgs(**arguments), ("0", "1"), KvTransferSettings(), log_stats=False)
        instances = [make(0) for make in factories.values()]
        try:
            await asyncio.gather(*(instance.start() for instance in instances))
            await instances[0].connect(instances[1:])
            return [await measure(instances, context, repetitions, seed) for seed, context in enumerate(contexts)]
        finally:
            await asyncio.gather(*(instance.stop(5.0) for instance in instances))


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table: medians with their 95 % intervals."""

    def cell(spread: dict[str, Any], scale: float, digits: int) -> str:
        low, high = spread["median_low"] * scale, spread["median_high"] * scale
        return f"{spread['median'] * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    print(
        "| context | gap ms | pre-copy ms | pull ms | recompute ms | pre-copy / gap | pull / gap | recompute / gap "
        "| pre-copy / pull | recompute / pull | gap while copying / gap |"
    )
    print("|" + "---|" * 11)
    for row in rows:
        cells = [
            cell(row["gap_s"], 1e3, 1),
            *(cell(row[f"{way}_pause_s"], 1e3, 0) for way in WAYS),
            *(cell(row[f"{way}_over_gap"], 1.0, 1) for way in WAYS),
            *(cell(row[f"{way}_over_pull"], 1.0, 2) for way in ("precopy", "recompute")),
            cell(row["copying_gap_over_gap"], 1.0, 1),
        ]
        print("|", row["context_tokens"], "|", " | ".join(cells), "|")


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="200,1000,4000,8000", help="prompt lengths in tokens")
    parser.add_argument("--repetitions", type=int, default=15, help="rounds per context")
    parser.add_argument("--wide", action="store_true", help="a model with a larger KV cache, and random weights")
    parser.add_argument("--name", default="migration_pause", help="of the file of results")
    options = parser.parse_args()
    contexts = [int(context) for context in options.contexts.split(",")]
    host = measuring.machine()
    rows = asyncio.run(run_all(contexts, options.repetitions, wide=options.wide))
    show(rows)
    settings = {
        "tokens_before": TOKENS_BEFORE,
        "repetitions": options.repetitions,
        "kv_blocks": WIDE_KV_BLOCKS if options.wide else KV_BLOCKS,
        "wide": WIDE if options.wide else None,
        "block_tokens": measuring.BLOCK_TOKENS,
    }
    print(measuring.write_results(options.name, host, settings, rows))


if __name__ == "__main__":
    main()
