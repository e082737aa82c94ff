"""
Times a kernel on the two batches of a pair.

The batches take turns, so that both see the same clocks, and so do the copies of each, so that none is in the L2 cache
when it is read. On a GPU, times are CUDA events of calls that are queued behind a pause, so that the kernels follow one
another without waiting for Python; on a processor, wall time.
"""

import time
from collections.abc import Sequence
from typing import Final

import torch

from cascadeinfer.profiling.kernels.calls import Call, Shape
from cascadeinfer.profiling.kernels.pairs import Pair

WARM_CALLS: Final = 3
PAUSE_CYCLES: Final = 10_000_000
"""About 5 ms of a GPU: longer than Python needs to queue a round of calls."""
CALLS_QUEUED: Final = 16
COLD_SHARE: Final = 2.5
"""The copies of a batch together are at least this many times the L2 cache."""
MAX_COPIES: Final = 16
MEMORY_SHARE: Final = 0.4
"""Of the free memory, for the copies of one batch."""


def copies_for(pair: Pair, shape: Shape, device: str) -> int:
    """Copies of each batch, so that the cache is cold and the memory suffices for both."""
    if device == "cpu":
        return 2
    one_bytes = sum(pair.mixed) * shape.kv_heads * shape.head_dim * 2 * 2
    cold = int(COLD_SHARE * torch.cuda.get_device_properties(0).L2_cache_size / one_bytes) + 1
    free_bytes, _ = torch.cuda.mem_get_info()
    return max(1, min(max(cold, 2), MAX_COPIES, int(MEMORY_SHARE * free_bytes / (2 * one_bytes))))


def times_us(mixed: Sequence[Call], equal: Sequence[Call], calls: int, device: str) -> tuple[list[float], list[float]]:
    """Times of single calls of two batches in microseconds; the batches take turns, and so do their copies."""
    sides = (mixed, equal)
    for number in range(WARM_CALLS):
        for side in sides:
            side[number % len(side)]()
    found: tuple[list[float], list[float]] = ([], [])
    for first in range(0, calls, CALLS_QUEUED):
        for side, times in zip(sides, found, strict=True):
            chosen = [side[number % len(side)] for number in range(first, min(first + CALLS_QUEUED, calls))]
            times.extend(_cuda_us(chosen) if device == "cuda" else [_wall_us(call) for call in chosen])
    return found


def _cuda_us(calls: Sequence[Call]) -> list[float]:
    """Time of each call on the GPU."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    torch.cuda._sleep(PAUSE_CYCLES)  # noqa: SLF001 - torch has no other way to keep the stream busy
    for call, (begin, end) in zip(calls, events, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in events]


def _wall_us(call: Call) -> float:
    begun_s = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begun_s)
