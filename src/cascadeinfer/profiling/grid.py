"""
Chooses the batches to measure: everything the engine can hold, from one short request to as many long ones as fit.

    decode   n requests of one length: count and length in powers, so that every corner of (count, KV) is covered
    mixed    one long request among short ones, a quarter long ones, lengths spread over the whole range
    prompt   prompts alone, up to the longest, which is computed in chunks after ever more context; up to the token
             budget, sizes grow by at most a half, so that some lie around the knee of the dense layers
    both     prompts of several sizes computed while a batch decodes, of one length or with one long request: some below
             the limit of CUDA graphs, some above, where attention backends cut decodes otherwise

Each kind of batch is reached by submitting its requests and waiting until all decode; the chunks on the way are
measured too. Every other count is lowered by a quarter: engines that capture graphs do so at round sizes, so a profile
of round sizes only would be too optimistic.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.types import InstanceCapacity

DECODE_STEPS: Final = 24
"""Steps that a batch decodes before prompts are added; enough for a median."""
PROMPT_REPEATS: Final = 3
"""How often each added prompt is computed."""
STEPS_BETWEEN_PROMPTS: Final = 2
SPARE_TOKENS: Final = 32
"""Tokens that a request could still generate when the batch is over: the engine runs ahead of its client."""
SHORTEST_TOKENS: Final = 16
LENGTH_FACTOR: Final = 4
SMALL_BATCHES: Final = 64
"""Up to this many requests per batch, counts double; beyond, they quadruple, starting alternately from one and two."""
MIXED_COUNTS: Final = (4, 12, 48, 192)
BESIDE_TOKENS: Final = (128, 384, 768, 2048)
"""Prompts beside decodes of mixed lengths: two below the 512 tokens up to which vLLM has CUDA graphs, two above."""
FULL_SHARE: Final = 0.95
"""Share of the KV blocks to use: a batch that fills them all would be preempted."""
FEWEST_KINDS: Final = 8


@dataclass(frozen=True, slots=True)
class BatchKind:
    """
    Requests that decode together, and prompts that are computed meanwhile.

    Attributes:
        family: `decode`, `mixed`, `prompt` or `both`.
        lengths: Prompt tokens of the decoding requests.
        prompts: Tokens of the added prompts, each computed `PROMPT_REPEATS` times, one after another.
    """

    family: str
    lengths: tuple[int, ...]
    prompts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """A readable name, unique in a grid."""
        counts = {length: self.lengths.count(length) for length in dict.fromkeys(self.lengths)}
        spread = len(counts) > 3
        decoding = (
            f"{len(self.lengths)} x {min(counts)}..{max(counts)}"
            if spread
            else " + ".join(f"{n} x {length}" for length, n in counts.items())
        )
        added = " ".join(map(str, self.prompts))
        return f"{self.family} " + " with prompt ".join(part for part in (decoding, added) if part)

    @property
    def work_tokens(self) -> int:
        """Tokens to compute to reach the batch, a measure of its cost."""
        return sum(self.lengths) + PROMPT_REPEATS * sum(self.prompts) + DECODE_STEPS * len(self.lengths)


@dataclass(frozen=True, slots=True)
class Room:
    """
    What the engine can hold.

    Attributes:
        max_model_tokens: Longest sequence.
    """

    capacity: InstanceCapacity
    max_model_tokens: int

    def output_tokens(self, kind: BatchKind) -> int:
        """Output tokens that each request of a batch needs, so that none ends before the batch is over."""
        budget = self.capacity.max_batched_tokens
        ramp = -(-sum(kind.lengths) // budget) + len(kind.lengths)
        left = max(1, budget - len(kind.lengths))
        beside = sum(PROMPT_REPEATS * (-(-tokens // left) + STEPS_BETWEEN_PROMPTS) for tokens in kind.prompts)
        return ramp + 2 * (DECODE_STEPS + beside) + SPARE_TOKENS

    def holds(self, kind: BatchKind) -> bool:
        """Whether the batch fits: requests, length of each, KV blocks, tokens of a step."""
        n, capacity = len(kind.lengths), self.capacity
        if n + bool(kind.prompts) > capacity.max_num_seqs or n + bool(kind.prompts) > capacity.max_batched_tokens:
            return False
        output = self.output_tokens(kind)
        full = [length + output for length in kind.lengths] + [tokens + 1 for tokens in kind.prompts]
        if max(full) > self.max_model_tokens:
            return False
        blocks = sum(capacity.blocks_for(tokens) for tokens in full[:n])
        blocks += max((capacity.blocks_for(tokens) for tokens in full[n:]), default=0)
        return blocks <= FULL_SHARE * capacity.kv_blocks

    def steps(self, kind: BatchKind) -> Iterator[tuple[BatchFeatures, float]]:
        """Approximate batches of the steps that a kind takes, with the number of each; for estimates of its time."""
        n, kv, budget = len(kind.lengths), sum(kind.lengths), self.capacity.max_batched_tokens
        if n:
            chunk = min(kv, budget)
            yield BatchFeatures(n // 2, kv // 2, max(kind.lengths), chunk, chunk * kv / n / 2), kv / chunk
            yield BatchFeatures(n, kv, max(kind.lengths)), float(DECODE_STEPS)
        for tokens in kind.prompts:
            chunk = min(tokens, max(1, budget - n))
            longest = max(kind.lengths, default=0)
            yield BatchFeatures(n, kv, longest, chunk, chunk * tokens / 2), PROMPT_REPEATS * tokens / chunk


def make_grid(room: Room) -> list[BatchKind]:
    """
    The kinds of batch that fit, least work first.

    Raises:
        ConfigError: The engine holds too little to distinguish its coefficients.
    """
    lengths = _lengths(room)
    kinds = [*_decode(room, lengths), *_mixed(room, lengths), *_prompts(room, lengths), *_both(room, lengths)]
    fitting = {kind.name: kind for kind in kinds if room.holds(kind)}
    if len(fitting) < FEWEST_KINDS:
        raise ConfigError(
            f"the engine holds {room.capacity.kv_tokens} tokens, {room.capacity.max_num_seqs} requests and "
            "sequences of "
            f"{room.max_model_tokens}: {len(fitting)} kinds of batch fit, a profile needs {FEWEST_KINDS}",
            option="--max-model-len, --max-num-seqs, --kv-cache-memory-bytes",
            fix="raise the smallest",
        )
    return sorted(fitting.values(), key=lambda kind: (kind.work_tokens, kind.name))


def _lengths(room: Room) -> list[int]:
    """Lengths in powers, and the longest that one request can have."""
    longest = room.max_model_tokens - room.output_tokens(BatchKind("decode", (room.max_model_tokens,)))
    longest = min(longest, int(FULL_SHARE * room.capacity.kv_tokens) - 2 * room.capacity.block_size_tokens)
    lengths = []
    length = SHORTEST_TOKENS
    while length < 0.7 * longest:
        lengths.append(length)
        length *= LENGTH_FACTOR
    return [*lengths, longest] if longest >= SHORTEST_TOKENS else []


def _counts(room: Room, row: int) -> list[int]:
    """Counts of requests for a row of the grid, up to the engine's limit."""
    most = room.capacity.max_num_seqs
    small = most <= SMALL_BATCHES
    count, factor = (1, 2) if small else (1 + row % 2, 4)
    counts = []
    while count < most:
        counts.append(count)
        count *= factor
    return [*counts, most]


def _decode(room: Room, lengths: Sequence[int]) -> Iterator[BatchKind]:
    for row, length in enumerate(lengths):
        for column, count in enumerate(_counts(room, row)):
            uneven = count - count // 4 if (row + column) % 2 else count
            yield BatchKind("decode", (length,) * uneven)


def _mixed(room: Room, lengths: Sequence[int]) -> Iterator[BatchKind]:
    if len(lengths) < 2:
        return
    longest = lengths[-1]
    middle = lengths[len(lengths) // 3]
    for count in MIXED_COUNTS:
        for short in dict.fromkeys((lengths[0], lengths[len(lengths) // 2])):
            for top in (longest, longest // LENGTH_FACTOR):
                yield from _first_that_fits(room, top, short, partial(_some_long, short, count, 1))
        yield from _first_that_fits(room, longest, middle, partial(_some_long, middle, count, count // 4))
        yield from _first_that_fits(room, longest, lengths[0], partial(_spread, lengths[0], count))
        most = min(room.capacity.max_batched_tokens - count, room.max_model_tokens - SPARE_TOKENS)
        beside = tuple(size for size in BESIDE_TOKENS if size <= most)
        if beside:
            long = partial(_some_long, middle, count, 1)
            yield from _first_that_fits(room, longest // LENGTH_FACTOR, middle, long, beside)


def _some_long(short: int, count: int, n_long: int, top: int) -> tuple[int, ...]:
    """Mostly short requests, and some long ones."""
    return (short,) * (count - n_long) + (top,) * n_long


def _first_that_fits(
    room: Room,
    longest: int,
    shortest: int,
    lengths_of: Callable[[int], tuple[int, ...]],
    prompts: tuple[int, ...] = (),
) -> Iterator[BatchKind]:
    """
    The mixed batch with the longest long requests that fit, with these prompts beside it; none if they would hardly
    exceed the short ones.
    """
    top = longest
    while top >= 3 * shortest:
        kind = BatchKind("both" if prompts else "mixed", lengths_of(top), prompts)
        if room.holds(kind):
            yield kind
            return
        top = int(0.7 * top)


def _spread(low: int, count: int, high: int) -> tuple[int, ...]:
    """Lengths at equal logarithmic distances, so that short ones are frequent, in mixed order."""
    lengths = np.geomspace(low, high, count).round().astype(int)
    return tuple(int(lengths[(i * 7) % count]) for i in range(count)) if count % 7 else tuple(map(int, lengths))


def _prompts(room: Room, lengths: Sequence[int]) -> Iterator[BatchKind]:
    budget = room.capacity.max_batched_tokens
    longest = room.max_model_tokens - SPARE_TOKENS
    sizes = {*lengths, *(length * 2 for length in lengths), min(budget, longest), longest}
    sizes |= {size for size in (3 * length // 2 * step for length in lengths for step in (1, 2)) if size <= budget}
    for tokens in sorted(sizes):
        if SHORTEST_TOKENS <= tokens <= longest:
            yield BatchKind("prompt", (), (tokens,))


def _both(room: Room, lengths: Sequence[int]) -> Iterator[BatchKind]:
    for count in (1, 3, 8, 24, 64):
        budget = room.capacity.max_batched_tokens - count
        for length in lengths[1::2]:
            sizes = sorted({min(size, budget) for size in (SHORTEST_TOKENS, 8 * SHORTEST_TOKENS, budget) if size > 0})
            yield BatchKind("both", (length,) * count, tuple(size for size in sizes if size < room.max_model_tokens))
