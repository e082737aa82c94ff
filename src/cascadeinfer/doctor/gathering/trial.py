"""
Two small instances: moves in both directions with their texts compared, the pauses, and mixed against equal lengths.

The model is the tiny one, in float32, whose greedy text changes when a block of its KV cache is lost or exchanged.
Each request runs once without a move and once with one. Prefix caches are off, so that a move pulls the whole context.

On a processor the batches are timed here, as steps of one of the instances, since no part of vLLM's attention there can
be called by itself; on a GPU `kernels.py` times the kernel.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cascadeinfer.core.migration import ROOM_SLACK_TOKENS
from cascadeinfer.doctor.facts import Carriers, Mixed, Move, Started
from cascadeinfer.doctor.gathering.notes import Notes
from cascadeinfer.doctor.gathering.ucx_log import transports_in
from cascadeinfer.doctor.texts import first_difference
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.protocol import Resume
from cascadeinfer.profiling.grid import BatchKind
from cascadeinfer.profiling.kernels.pairs import Pair, pair_of
from cascadeinfer.profiling.measure import Meter, Progress
from cascadeinfer.profiling.running import running_subjects
from cascadeinfer.profiling.subject import Subject

MAX_MODEL_TOKENS: Final = 2048
KV_BLOCKS: Final = 256
BLOCK_TOKENS: Final = 32
ENGINE: Final = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_TOKENS), "--block-size",
    str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(KV_BLOCKS), "--max-num-seqs", "32",
    "--max-num-batched-tokens", "1024", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.2",
)  # fmt: skip
"""The instances: small enough for a machine that is in use."""
CONTEXTS: Final = (64, 200, 600, 1200)
"""Prompt lengths of the requests that move, in each direction; the first one warms the connection up."""
OUTPUT_TOKENS: Final = 96
TOKENS_BEFORE_MOVE: Final = 16
ATTEMPTS: Final = 5
"""For each move: a request may end before its cut reaches the engine, where a front end waits for a core."""
RESERVED_TOKENS: Final = OUTPUT_TOKENS + ROOM_SLACK_TOKENS
MIXED: Final = pair_of("15 x 48 + 1 x 1500 tokens", (48,) * 15 + (1500,))
ROUNDS: Final = 3


def gather(notes: Notes, words: Sequence[str]) -> None:
    """
    Start two instances, try them, stop them.

    Args:
        notes: For the facts.
        words: The file to which this process's output goes, UCX's words among it.
    """
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_try(notes, str(make_tiny_llama(Path(folder))), Path(words[0])))


async def _try(notes: Notes, model: str, log: Path) -> None:
    notes.doing("starting two instances")
    begun_s = time.monotonic()
    async with running_subjects(_options(["--model", model, *ENGINE]), 2) as subjects:
        identity = subjects[0].identity
        notes.add(
            Started(
                seconds=time.monotonic() - begun_s,
                device=identity.device,
                backend=identity.attention_backend,
                kv_tokens=subjects[0].capacity.kv_tokens,
            )
        )
        async with Meter(subjects[0], seed=1) as one, Meter(subjects[1], seed=2) as other:
            for context in CONTEXTS:
                for source, target in ((one, other), (other, one)):
                    names = f"{_name(source)} to {_name(target)}"
                    notes.doing(f"moving a request of {context} tokens from instance {names}")
                    notes.add(await moved(source, target, context))
            notes.add(Carriers(transports=await asyncio.to_thread(_transports, log)))
            if identity.threads:
                notes.doing("timing steps of mixed and of equal lengths")
                notes.add(await mixed_steps(one, MIXED))
        notes.doing("stopping the instances")


def _options(words: Sequence[str]) -> argparse.Namespace:
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - imports vLLM
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415 - imports vLLM

    parser = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(parser)
    parsed: argparse.Namespace = parser.parse_args(list(words))
    return parsed


def _transports(log: Path) -> list[str]:
    return transports_in(log.read_text(encoding="utf-8", errors="replace"))


def _name(meter: Meter) -> str:
    return meter.subject.engine.instance_id


async def moved(source: Meter, target: Meter, context: int) -> Move:
    """A request of a random prompt, without a move and with one; several attempts until one is not too late."""
    prompt = source.random_prompt(context)
    alone = await source.send_prompt(f"alone-{context}-{_name(source)}", prompt, OUTPUT_TOKENS)
    await source.until_end(alone)
    gap_s = (alone.last_token_s - alone.first_token_s) / max(1, alone.tokens - 1)
    refusal = ""
    for attempt in range(ATTEMPTS):
        name = f"move-{context}-{_name(source)}-{attempt}"
        found = await _moved_once(source, target, name, prompt)
        if isinstance(found, str):
            refusal = found
            continue
        text, pause_s, pulled = found
        return Move(
            source=_name(source), target=_name(target), context_tokens=context, pulled=pulled, refusal="",
            tokens=len(text), differs_at=first_difference(alone.token_ids, text), gap_s=gap_s, pause_s=pause_s,
        )  # fmt: skip
    return Move(
        source=_name(source), target=_name(target), context_tokens=context, pulled=False, refusal=refusal, tokens=0,
        differs_at=None, gap_s=gap_s, pause_s=0.0,
    )  # fmt: skip


async def _moved_once(
    source: Meter, target: Meter, name: str, prompt: list[int]
) -> tuple[list[int], float, bool] | str:
    """Text, pause in seconds, and whether the KV cache was pulled; or why the request did not move."""
    here, there = source.subject.engine, target.subject.engine
    if (refused := await there.reserve(name, len(prompt) + RESERVED_TOKENS)) is not None:
        return f"the target refuses to reserve room: {refused}"
    before = await source.send_prompt(name, prompt, OUTPUT_TOKENS)
    await source.until(lambda: before.tokens >= TOKENS_BEFORE_MOVE)
    refused = await here.cut(name)
    await source.until_end(before)
    if before.ticket is None:
        await there.release_reservation(name)
        return f"the source refuses to cut it: {refused}" if refused is not None else "it ended before it was cut"
    pulls = (await there.report())[1].pulls
    after = await _resumed(target, name, prompt, before)
    await target.until_end(after)
    counters = (await there.report())[1]
    return [*before.token_ids, *after.token_ids], after.first_token_s - before.last_token_s, counters.pulls > pulls


async def _resumed(target: Meter, name: str, prompt: list[int], before: Progress) -> Progress:
    subject: Subject = target.subject
    after = target.expect(f"{name}-moved")
    request = subject.make_request(name, prompt, OUTPUT_TOKENS)
    await subject.engine.add(f"{name}-moved", request, Resume(list(before.token_ids), before.ticket, name))
    return after


async def mixed_steps(meter: Meter, pair: Pair) -> Mixed:
    """Steps of an instance in which a mixed batch decodes, and an equal one; the two take turns."""
    sides = {"mixed": pair.mixed, "equal": pair.equal}
    steps_s: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(ROUNDS):
        for side, lengths in sides.items():
            run = await meter.run(BatchKind(side, lengths), number)
            steps_s[side] += [
                step.step_s for step in run.steps if step.n_decode == len(lengths) and not step.prefill_tokens
            ]
    fewest = min(len(found) for found in steps_s.values())
    what = f"whole steps ({meter.subject.identity.attention_backend})"
    if not fewest:
        return Mixed(what=what, batch=pair.name, ratio=0.0, samples=0, error="no step had the whole batch")
    ratio = statistics.median(steps_s["mixed"]) / statistics.median(steps_s["equal"])
    return Mixed(what=what, batch=pair.name, ratio=ratio, samples=fewest)
