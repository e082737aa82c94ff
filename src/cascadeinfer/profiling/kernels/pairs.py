"""
Batches of decoding requests in pairs: mixed lengths, and equal lengths of the same count and total KV.

A pair isolates what mixing costs: both batches read the same bytes for the same number of requests. The fixed mixes are
those for which `docs/profiles.md` has predictions; the drawn ones are what an instance holds that serves the trace:
requests weighted by their decode steps, each at a uniform point of its output.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascadeinfer.workload.trace import Trace

KILO: Final = 1024
FIXED: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "31 x 1K + 1 x 128K": ((31, 1), (1, 128)),
    "63 x 2K + 1 x 64K": ((63, 2), (1, 64)),
    "60 x 2K + 4 x 32K": ((60, 2), (4, 32)),
}
"""Name: pairs of (requests, length in units of 1,024 tokens)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """
    A mixed batch and its equal counterpart.

    Attributes:
        mixed: KV tokens of each request, in batch order.
        equal: The same number of requests and of tokens, as equal as whole tokens allow.
    """

    name: str
    mixed: tuple[int, ...]
    equal: tuple[int, ...]


def equal_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """As many lengths with the same total, which differ by one token at most."""
    each, left = divmod(sum(lengths), len(lengths))
    return (each + 1,) * left + (each,) * (len(lengths) - left)


def pair_of(name: str, mixed: tuple[int, ...]) -> Pair:
    """A mixed batch with its counterpart; every length must be at least one token."""
    assert min(mixed) >= 1
    return Pair(name, mixed, equal_lengths(mixed))


def fixed_pairs(divisor: int, seed: int) -> list[Pair]:
    """
    The fixed mixes, requests in random order, as a server holds them.

    Args:
        divisor: Lengths are divided by it, so that a processor can stand in for a GPU.
        seed: Of the order.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for name, groups in FIXED.items():
        lengths = np.concatenate([np.full(count, max(1, kilos * KILO // divisor)) for count, kilos in groups])
        pairs.append(pair_of(name, tuple(int(length) for length in rng.permutation(lengths))))
    return pairs


def drawn_pair(name: str, trace: Trace, count: int, divisor: int, longest: int, seed: int) -> Pair:
    """
    A batch drawn from a trace.

    Args:
        name: Of the trace.
        trace: With prompt and output lengths.
        count: Requests.
        divisor: As for `fixed_pairs`.
        longest: Longer requests are cut to it (tokens, before the division).
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    prompts, outputs = np.asarray(trace.prompt_tokens), np.asarray(trace.output_tokens)
    chosen = rng.choice(len(prompts), count, p=outputs / outputs.sum())
    done = (outputs[chosen] * rng.random(count)).astype(np.int64)
    lengths = np.clip(prompts[chosen] + done, 1, longest) // divisor
    return pair_of(f"{count} drawn from {name}", tuple(int(max(1, length)) for length in lengths))
