"""
The rate at which KV moves between two instances: requests are cut on one and resumed on the other, at several lengths.

A pull is timed at the client, from the resumption to the first token from the target, less one step. Its slope over the
length is the time per byte; the rest at length zero (messages, scheduling) is the same for every pull and does not
count. Where the slope drowns in the noise, the rate is the longest pull's bytes over its whole time: less than the link
can do, and what a hand-over really gets.
"""

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np

from cascadeinfer.core.cost.profile import TransferMeasurement
from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import Resume
from cascadeinfer.profiling.grid import FULL_SHARE, SHORTEST_TOKENS
from cascadeinfer.profiling.log import PullRun
from cascadeinfer.profiling.measure import Meter
from cascadeinfer.profiling.subject import Subject

PULLS_PER_LENGTH: Final = 7
LENGTHS: Final = 4
OUTPUT_TOKENS: Final = 96
TOKENS_BEFORE_CUT: Final = 4
TOKENS_AFTER: Final = 8
SLOPE_SHARE: Final = 0.2
"""Share of the longest pull's time: a smaller part that grows with the length cannot be told from noise."""
SLOPE_SPREAD: Final = 0.5
"""Half the interquartile range of the slopes over their median: above it, the slope is noise."""


@dataclass(frozen=True, slots=True)
class TransferRate:
    """
    The rate found.

    Attributes:
        note: How the rate follows from the pulls.
    """

    bytes_per_s: float
    measurement: TransferMeasurement
    note: str


def pull_lengths(subject: Subject) -> list[int]:
    """Prompt lengths to pull: at equal distances up to the longest that fits, each several times, in turns."""
    room = int(FULL_SHARE * subject.capacity.kv_tokens) - 2 * subject.capacity.block_size_tokens
    longest = min(subject.max_model_tokens, room) - OUTPUT_TOKENS
    lengths = sorted({int(n) for n in np.linspace(max(SHORTEST_TOKENS, longest / LENGTHS), longest, LENGTHS)})
    return [length for _ in range(PULLS_PER_LENGTH) for length in lengths]


async def pull(source: Meter, target: Meter, prompt_tokens: int, name: str) -> PullRun:
    """
    Move one request.

    Raises:
        EngineError: The request could not be cut, or the target recomputed it.
    """
    prompt = source.random_prompt(prompt_tokens)
    before = await source.send_prompt(name, prompt, OUTPUT_TOKENS)
    await source.until(lambda: before.tokens >= TOKENS_BEFORE_CUT)
    refused = await source.subject.engine.cut(name)
    await source.until(lambda: before.ended)
    if refused is not None or before.ticket is None:
        raise EngineError(f"a request was not cut: {refused}", instance_id=source.subject.engine.instance_id)
    counters = (await target.subject.engine.report())[1]
    after = target.expect(f"{name}-moved")
    begun_s = target.now_s()
    request = target.subject.make_request(name, prompt, OUTPUT_TOKENS)
    await target.subject.engine.add(f"{name}-moved", request, Resume(list(before.token_ids), before.ticket))
    await target.until(lambda: after.tokens >= TOKENS_AFTER or after.ended)
    step_s = (target.last_output_s - after.first_token_s) / max(1, after.tokens - 1)
    ended = (await target.subject.engine.report())[1]
    await target.clear()
    await source.clear()
    if ended.pulls == counters.pulls or ended.failed_pulls > counters.failed_pulls:
        raise EngineError("a pull failed and was recomputed", instance_id=target.subject.engine.instance_id)
    pull_s = max(0.0, after.first_token_s - begun_s - step_s)
    return PullRun(pulled_tokens=prompt_tokens + len(before.token_ids) - 1, pull_s=pull_s)


def rate_of(pulls: list[PullRun], kv_bytes_per_token: int) -> TransferRate:
    """The rate from pulls of several lengths: the median slope (Theil-Sen), or the longest pulls' whole time."""
    tokens = np.array([run.pulled_tokens for run in pulls], dtype=np.float64)
    seconds = np.array([run.pull_s for run in pulls], dtype=np.float64)
    near = tokens > 0.95 * tokens.max()
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(pulls)), 2)
        if abs(tokens[i] - tokens[j]) > 0.1 * tokens.max()
    ]
    slopes = np.array([(seconds[i] - seconds[j]) / (tokens[i] - tokens[j]) for i, j in pairs] or [0.0])
    slope = float(np.median(slopes))
    whole_s = float(np.median(seconds[near]))
    low, high = np.quantile(slopes, (0.25, 0.75))
    grows = slope * float(tokens.max()) > SLOPE_SHARE * whole_s > 0.0
    if grows and high - low <= 2.0 * SLOPE_SPREAD * slope:
        rate, spread = kv_bytes_per_token / slope, float(high - low) / 2.0 / slope
        fixed_s = max(0.0, float(np.median(seconds - slope * tokens)))
        note = "KV transfer: slope of pulls over their length, measured between two instances"
    else:
        whole_s = max(whole_s, 1e-6)
        low, high = np.quantile(seconds[near], (0.25, 0.75))
        rate, spread = kv_bytes_per_token * float(np.median(tokens[near])) / whole_s, float(high - low) / 2.0 / whole_s
        fixed_s = 0.0
        note = (
            "KV transfer: bytes of the longest pulls over their whole time, measured between two instances; the time "
            "hardly grows with the length, or not steadily, so the link is faster than this"
        )
    found = TransferMeasurement(
        pulls=len(pulls), longest_tokens=int(tokens.max()), fixed_s=fixed_s, spread=max(0.0, spread)
    )
    return TransferRate(rate, found, note)
