"""
Part `kernels`: what mixed lengths cost each attention kernel, alone and beside a prompt chunk.

One layer, bfloat16, head_dim 128, a paged cache that is cold in the L2 cache. The two batches of a pair take turns, so
that both see the same clocks; a row has the medians of both and their ratio, beside the prediction of the cost model.
On a GPU, times are CUDA events of calls that are queued behind a pause, so that the kernels follow one another without
waiting for Python; on a processor, wall time.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from part_options import options_of
from predictions import device_known, predicted
from row_log import RowLog

from cascadeinfer.config.traces import SAMPLE, load_trace
from cascadeinfer.profiling.kernels.calls import TOLERANCE, Kernel, PagedBatch, Shape, kernels_here, largest_error
from cascadeinfer.profiling.kernels.pairs import Pair, drawn_pair, fixed_pairs
from cascadeinfer.profiling.kernels.timing import copies_for, times_us


@dataclass(frozen=True, slots=True)
class Grid:
    """
    What is measured.

    Attributes:
        heads: (query heads, KV heads).
        pages: Tokens of a page.
        prompts: Tokens of the chunk beside the decodes.
        divisor: Of the lengths.
        drawn: Requests drawn from a trace.
        longest: Cut of drawn lengths, before the division.
        calls: Timed calls of each batch of a pair.
    """

    heads: tuple[tuple[int, int], ...]
    pages: tuple[int, ...]
    prompts: tuple[int, ...]
    divisor: int
    drawn: int
    longest: int
    calls: int


GRIDS: Final = {
    "cuda": Grid(((32, 8), (8, 1)), (16, 64), (0, 64, 256, 512, 1024, 2048), 1, 64, 131_072, 48),
    "cpu": Grid(((4, 2),), (16,), (0, 64), 256, 16, 32_768, 3),
}
SEED: Final = 0


def pairs_of(grid: Grid) -> list[Pair]:
    """The pairs of batches: the fixed ones, and one drawn from each trace of the package."""
    drawn = drawn_pair(SAMPLE, load_trace(SAMPLE), grid.drawn, grid.divisor, grid.longest, SEED)
    return [*fixed_pairs(grid.divisor, SEED), drawn]


def agreeing(kernels: Sequence[Kernel], shape: Shape, device: str, log: RowLog) -> Iterator[Kernel]:
    """The kernels that compute what plain torch computes; what the others do is said on standard error."""
    for kernel in kernels:
        key = f"check {kernel.name}, {shape.q_heads}/{shape.kv_heads} heads, page {shape.page_tokens}"
        try:
            error = max(largest_error(kernel, shape, prompt, device) for prompt in (0, 40))
        except (RuntimeError, ImportError, TypeError, ValueError, AttributeError) as cause:
            sys.stderr.write(f"{key}: cannot be called: {type(cause).__name__}: {cause}\n")
            continue
        if error > TOLERANCE:
            sys.stderr.write(f"{key}: differs from plain torch by {error:.3g}\n")
            continue
        if not log.has(key):
            log.add(key, largest_error=error)
        yield kernel


def measure(grid: Grid, device: str, log: RowLog) -> int:
    """Measure what is missing; returns the number of failures, each told on standard error."""
    kernels = kernels_here(device)
    known = None
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        known = device_known(facts.name, facts.multi_processor_count)
    shapes = [Shape(*heads, page) for heads in grid.heads for page in grid.pages]
    usable = {shape: list(agreeing(kernels, shape, device, log)) for shape in shapes}
    failures = sum(len(kernels) - len(found) for found in usable.values())
    for prompt in grid.prompts:
        for shape in shapes:
            for pair in pairs_of(grid):
                missing = [kernel for kernel in usable[shape] if not log.has(key_of(kernel, shape, pair, prompt))]
                failures += _measure_cell(missing, shape, pair, prompt, grid.calls, device, known, log)
    return failures


def key_of(kernel: Kernel, shape: Shape, pair: Pair, prompt: int) -> str:
    """Key of a row."""
    return f"{kernel.name}, {shape.q_heads}/{shape.kv_heads} heads, page {shape.page_tokens}, {pair.name}, {prompt}"


def _measure_cell(
    kernels: Sequence[Kernel],
    shape: Shape,
    pair: Pair,
    prompt: int,
    calls: int,
    device: str,
    known: str | None,
    log: RowLog,
) -> int:
    """All kernels on one pair; returns the number of failures."""
    if not kernels:
        return 0
    copies = copies_for(pair, shape, device)
    batches = [
        PagedBatch(lengths, prompt, shape, device=device, copies=copies, seed=SEED)
        for lengths in (pair.mixed, pair.equal)
    ]
    failures = 0
    for kernel in kernels:
        key = key_of(kernel, shape, pair, prompt)
        try:
            mixed_us, equal_us = times_us(*(kernel.prepare(batch) for batch in batches), calls, device)
        except RuntimeError as cause:
            sys.stderr.write(f"{key}: {cause}\n")
            failures += 1
            continue
        mixed, equal = statistics.median(mixed_us), statistics.median(equal_us)
        log.add(
            key,
            kernel=kernel.name, q_heads=shape.q_heads, kv_heads=shape.kv_heads, page_tokens=shape.page_tokens,
            batch=pair.name, requests=len(pair.mixed), kv_tokens=sum(pair.mixed), prompt_tokens=prompt, copies=copies,
            calls=calls, mixed_us=mixed, equal_us=equal, ratio=mixed / equal, mixed_spread=_spread(mixed_us),
            equal_spread=_spread(equal_us), **predicted(known, kernel.name, shape, pair, prompt),
        )  # fmt: skip
    return failures


def _spread(times: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def settings_of(grid: Grid) -> dict[str, Any]:
    """What the rows depend on."""
    return {"seed": SEED, **{name: getattr(grid, name) for name in ("divisor", "drawn", "longest", "calls")}}


def main() -> None:
    """Measure; exit code 1 if a kernel that is installed could not be measured."""
    options: argparse.Namespace = options_of(__doc__)
    grid = GRIDS[options.device]
    if options.device == "cpu":
        torch.set_num_threads(1)  # on a busy machine, threads of such small operations mostly wait for one another
    with RowLog(Path(options.rows), settings_of(grid)) as log:
        failures = measure(grid, options.device, log)
    sys.exit(f"{failures} kernels or cells could not be measured; see above" if failures else 0)


if __name__ == "__main__":
    main()
