"""
Part `steps`: how long a step takes in which many requests decode beside prompt tokens; and a cost profile.

A real engine, eager and, on a GPU, with CUDA graphs. First 130 requests of equal lengths decode beside 0 to 2,048
prompt tokens, then a mixed batch of them: the knee up to which prompt tokens ride along with the read of the weights,
and what a long request does to such a step. All that with the profiler's own code (`cascadeinfer/profiling`). The time
left goes to the profiler's grid, and a profile is fitted to all steps: `steps-WAY.json`.
"""

import argparse
import asyncio
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from part_options import options_of
from predictions import device_known
from row_log import RowLog
from stand_ins import device_memory_bytes, largest_for, write_model

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.cost.profile import CostProfile, encode_profile
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.profiling.fitting import ProfileFit
from cascadeinfer.profiling.grid import BatchKind, Room
from cascadeinfer.profiling.log import SUFFIX, BatchRun, MeasuredStep, SampleLog
from cascadeinfer.profiling.measure import Meter
from cascadeinfer.profiling.profiler import Profiler, header_of, make_profile
from cascadeinfer.profiling.subject import Subject

ROUNDS: Final = 3
PROFILE_SHARE: Final = 0.6
"""Of the time left after the knee, for the grid; the rest is for the fit and for stopping the engine."""


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What is measured on an engine.

    Attributes:
        ways: Names of the ways to run it, with vLLM's options.
        engine: vLLM's options for all ways.
        kinds: Batches, each with its added prompts.
        profiles: Whether the grid is measured, too.
    """

    ways: dict[str, tuple[str, ...]]
    engine: tuple[str, ...]
    kinds: tuple[BatchKind, ...]
    profiles: bool


PROMPTS: Final = (64, 128, 256, 384, 512, 768, 1024, 2048)
PLANS: Final = {
    "cuda": Plan(
        {"graphs": (), "eager": ("--enforce-eager",)},
        ("--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "36864", "--max-num-seqs", "256",
         "--max-num-batched-tokens", "4096"),
        (BatchKind("both", (1024,) * 130, PROMPTS),
         BatchKind("both", (512,) * 128 + (32_768,) * 2, PROMPTS)),
        profiles=True,
    ),
    "cpu": Plan(
        {"eager": ("--enforce-eager",)},
        ("--dtype", "float32", "--max-model-len", "512", "--num-gpu-blocks-override", "64", "--block-size", "32",
         "--max-num-seqs", "16", "--max-num-batched-tokens", "256"),
        (BatchKind("both", (48,) * 6, (16, 64)), BatchKind("both", (16,) * 5 + (208,), (16, 64))),
        profiles=False,
    ),
}  # fmt: skip


def engine_options(words: Sequence[str]) -> argparse.Namespace:
    """Engine options, parsed as vLLM's own commands do."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - imports vLLM
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415 - imports vLLM

    parser = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(parser)
    parsed: argparse.Namespace = parser.parse_args(list(words))
    return parsed


async def measure_way(words: Sequence[str], plan: Plan, samples: SampleLog, deadline_s: float) -> tuple[Subject, int]:
    """
    Start the engine one way, and measure what is missing.

    Returns:
        The (stopped) engine, and the number of kinds of batch in the profiler's grid.
    """
    from cascadeinfer.profiling.running import running_subjects  # noqa: PLC0415 - imports vLLM

    async with running_subjects(engine_options(words), 1) as subjects:
        n_kinds = await measure_engine(
            subjects[0], plan, samples, lambda: PROFILE_SHARE * (deadline_s - time.monotonic())
        )
        return subjects[0], n_kinds


async def measure_engine(subject: Subject, plan: Plan, samples: SampleLog, left_s: Callable[[], float]) -> int:
    """
    Measure what is missing on a started engine.

    Args:
        subject: The engine.
        plan: What to measure.
        samples: Where steps go, and where earlier ones are.
        left_s: Time for the profiler's grid, asked once the other batches are measured.

    Returns:
        The number of kinds of batch in the grid; 0 if it is not measured.
    """
    samples.open(header_of(subject))
    room = Room(subject.capacity, subject.max_model_tokens)
    async with Meter(subject, seed=len(samples.runs)) as meter:
        for number in range(ROUNDS):
            for kind in plan.kinds:
                ran = any(run.kind == kind.name and run.round == number for run in samples.runs)
                if not ran and room.holds(kind):
                    samples.add(await meter.run(kind, number))
    if not plan.profiles:
        return 0
    profiler = Profiler(subject, samples, budget_s=max(0.0, left_s()), watch=lambda _: None)
    await profiler.measure()
    return len(profiler.kinds)


def knee_rows(kind: BatchKind, runs: Sequence[BatchRun], reference: CostProfile | None) -> list[dict[str, Any]]:
    """
    The median step per number of prompt tokens beside the whole batch.

    Args:
        kind: The batch.
        runs: All runs.
        reference: A profile to compare with, or None.
    """
    by_prompt: defaultdict[int, list[MeasuredStep]] = defaultdict(list)
    for run in runs:
        for step in run.steps if run.kind == kind.name else ():
            if step.n_decode == len(kind.lengths) and step.prefill_tokens in {0, *kind.prompts}:
                by_prompt[step.prefill_tokens].append(step)
    rows = []
    for prompt, steps in sorted(by_prompt.items()):
        middle = sorted(steps, key=lambda step: step.step_s)[len(steps) // 2]
        features = BatchFeatures(
            middle.n_decode, middle.kv_tokens, middle.kv_tokens_max, prompt, middle.prefill_attention_tokens
        )
        rows.append(
            {
                "prompt_tokens": prompt,
                "steps": len(steps),
                "step_s": statistics.median(step.step_s for step in steps),
                "kv_tokens": middle.kv_tokens,
                "kv_tokens_max": middle.kv_tokens_max,
                "predicted_s": None if reference is None else reference.step_model.step_s(features),
            }
        )
    return rows


def write_rows(
    log: RowLog, way: str, model: str, plan: Plan, samples: SampleLog, reference: CostProfile | None
) -> None:
    """The rows of a way, relative to the step without a prompt."""
    for kind in plan.kinds:
        rows = knee_rows(kind, samples.runs, reference)
        if not rows and not log.has(f"{way}, {kind.name}"):
            log.add(f"{way}, {kind.name}", way=way, left_out="the engine has no room for this batch")
        alone_s = next((row["step_s"] for row in rows if row["prompt_tokens"] == 0), None)
        for row in rows:
            decodes = f"{len(kind.lengths)} decodes of {min(kind.lengths)}..{max(kind.lengths)}"
            key = f"{way}, {decodes}, {row['prompt_tokens']}"
            if log.has(key):
                continue
            log.add(
                key,
                way=way, model=model, decodes=len(kind.lengths), shortest=min(kind.lengths), longest=max(kind.lengths),
                over_alone=None if alone_s is None else row["step_s"] / alone_s, **row,
            )  # fmt: skip


def write_profile(subject: Subject, samples: SampleLog, n_kinds: int, file: Path, log: RowLog, way: str) -> None:
    """Fit a profile to the steps, and say how well it fits."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found = make_profile(
        subject, samples, n_kinds=n_kinds, command=command, date=datetime.now(tz=UTC).date().isoformat()
    )
    file.write_bytes(encode_profile(found.profile))
    log.add(f"{way}, profile", way=way, profile=file.name, errors=errors_of(found.fit), step_share=found.step_share)


def errors_of(fit: ProfileFit) -> dict[str, Any]:
    """Errors of the fit on batches that it has not seen, by region."""
    return {
        region.name: {"samples": region.samples, "median": region.median, "p90": region.p90, "bias": region.bias}
        for region in fit.held_out
    }


def reference_profile(shape_name: str) -> CostProfile | None:
    """The shipped profile of this model on this device, if there is one."""
    import torch  # noqa: PLC0415 - only where there is a GPU

    facts = torch.cuda.get_device_properties(0)
    known = device_known(facts.name, facts.multi_processor_count)
    if known is None:
        return None
    try:
        return load_profile(f"{known}-{shape_name}")
    except ProfileError:
        return None


def measure_all(options: argparse.Namespace, folder: Path) -> None:
    """Every way that is not complete."""
    plan = PLANS[options.device]
    deadline_s = time.monotonic() + options.seconds
    if options.device == "cpu":
        name, reference = "tiny", None
        make_tiny_llama(folder / name)
    else:
        shape = largest_for(device_memory_bytes())
        name, reference = shape.name, reference_profile(shape.name)
        write_model(folder / name, shape)
    with RowLog(
        options.rows, {"model": name, "engine": plan.engine, "seed": "of the prompts: batches measured before"}
    ) as log:
        ways = [way for way in plan.ways if not log.has(f"{way}, complete")]
        for number, way in enumerate(ways):
            until_s = time.monotonic() + (deadline_s - time.monotonic()) / (len(ways) - number)
            words = ["--model", str(folder / name), *plan.engine, *plan.ways[way]]
            stem = options.rows.with_name(f"{options.rows.stem}-{way}")
            samples = SampleLog(stem.with_name(stem.name + SUFFIX))
            with samples:
                subject, n_kinds = asyncio.run(measure_way(words, plan, samples, until_s))
                write_rows(log, way, name, plan, samples, reference)
                if plan.profiles:
                    write_profile(subject, samples, n_kinds, stem.with_suffix(".json"), log, way)
            log.add(f"{way}, complete", way=way)


def main() -> None:
    """Measure."""
    options = options_of(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        measure_all(options, Path(folder))


if __name__ == "__main__":
    main()
