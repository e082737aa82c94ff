"""Times the GPU's attention kernels on mixed and on equal lengths: one layer, bfloat16, heads of 128."""

import statistics
from collections.abc import Sequence
from typing import Final

from cascadeinfer.doctor.facts import Mixed
from cascadeinfer.doctor.gathering.notes import Notes
from cascadeinfer.profiling.kernels.calls import (
    TOLERANCE,
    Kernel,
    PagedBatch,
    Shape,
    kernels_here,
    largest_error,
)
from cascadeinfer.profiling.kernels.pairs import Pair, fixed_pairs
from cascadeinfer.profiling.kernels.timing import copies_for, times_us

SHAPE: Final = Shape(32, 8, 16)
PROMPTS: Final = (0, 1024)
"""Tokens of a prompt computed beside the decodes."""
CALLS: Final = 32
SEED: Final = 0
FAILURES: Final = (RuntimeError, ImportError, TypeError, ValueError, AttributeError)
"""What a kernel raises that does not fit this GPU, this version, or its memory."""


def gather(notes: Notes, words: Sequence[str]) -> None:
    """
    Time every kernel that is there.

    Args:
        notes: For the facts.
        words: The device, and what lengths are divided by.
    """
    device, divisor = words[0], int(words[1])
    pairs = fixed_pairs(divisor, SEED)
    for kernel in kernels_here(device):
        notes.doing(f"timing the kernel {kernel.name}")
        if error := _fault_of(kernel, device):
            notes.add(Mixed(what=kernel.name, batch="", ratio=0.0, samples=0, error=error))
            continue
        for prompt in PROMPTS:
            for pair in pairs:
                notes.add(timed(kernel, pair, prompt // divisor, device))


def _fault_of(kernel: Kernel, device: str) -> str:
    """Why a kernel cannot be timed; nothing if it can, and computes what plain torch computes."""
    try:
        error = largest_error(kernel, SHAPE, 0, device)
    except FAILURES as failure:
        return f"it cannot be called: {type(failure).__name__}: {' '.join(str(failure).split())}"
    return f"it differs from plain torch by {error:.3g}" if error > TOLERANCE else ""


def timed(kernel: Kernel, pair: Pair, prompt_tokens: int, device: str) -> Mixed:
    """A kernel on the two batches of a pair."""
    try:
        copies = copies_for(pair, SHAPE, device)
        mixed, equal = (
            PagedBatch(lengths, prompt_tokens, SHAPE, device=device, copies=copies, seed=SEED)
            for lengths in (pair.mixed, pair.equal)
        )
        mixed_us, equal_us = times_us(kernel.prepare(mixed), kernel.prepare(equal), CALLS, device)
    except FAILURES as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        return Mixed(what=kernel.name, batch=pair.name, ratio=0.0, samples=0, prompt_tokens=prompt_tokens, error=error)
    ratio = statistics.median(mixed_us) / statistics.median(equal_us)
    return Mixed(what=kernel.name, batch=pair.name, ratio=ratio, samples=len(mixed_us), prompt_tokens=prompt_tokens)
