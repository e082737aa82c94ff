"""
Measures each step's duration and batch where the steps are made.

A step begins when it is scheduled and ends when its output has been processed. If the engine was busy before, it begins
at the end of the previous step: the work between two steps (messages, serialisation) is part of a step's cost. With
asynchronous scheduling, where a step is scheduled while another runs, the time from end to end is what the device took.
So the seconds of a busy engine add up to wall time, and idle time is never counted.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput

STEPS_KEPT: Final = 4096
"""Steps kept between two reports, after which the oldest are dropped; a report takes them all."""


class TimedStep(NamedTuple):
    """A step: the fields of `BatchFeatures`, and seconds."""

    n_decode: int
    kv_tokens: int
    kv_tokens_max: int
    prefill_tokens: int
    prefill_attention_tokens: float
    step_s: float


class StepTimer:
    """Steps in the order in which they are scheduled, which is also the order in which they end."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start without steps; `clock` gives seconds."""
        self._clock = clock
        self._under_way: deque[tuple[float, bool, tuple[int, int, int, int, float]]] = deque()
        self._ended: dict[int, deque[TimedStep]] = {0: deque(maxlen=STEPS_KEPT)}
        self._last_end_s = 0.0
        self._was_busy = False

    def scheduled(self, output: SchedulerOutput) -> None:
        """Record that a step has been scheduled, including empty ones."""
        self._under_way.append(
            (self._clock(), self._was_busy or bool(self._under_way), features_of(entries_of(output)))
        )

    def ended(self, *, busy: bool) -> None:
        """
        Record that the output of the oldest running step has been processed; with `busy`, requests are left and the
        next step follows at once.
        """
        if not self._under_way:
            return
        scheduled_s, followed, features = self._under_way.popleft()
        now_s = self._clock()
        begun_s = self._last_end_s if followed else scheduled_s
        if features[0] or features[3]:
            step = TimedStep(*features, now_s - begun_s)
            for kept in self._ended.values():
                kept.append(step)
        self._last_end_s, self._was_busy = now_s, busy

    def idle(self) -> None:
        """Record that no request is left, so that the next step does not follow the last one directly."""
        self._was_busy = False

    def take(self, client_index: int) -> list[TimedStep]:
        """The steps that have ended since this front-end process last took them; the first call starts its count."""
        kept = self._ended.setdefault(client_index, deque(maxlen=STEPS_KEPT))
        steps = list(kept)
        kept.clear()
        return steps

    def forget(self, client_index: int) -> None:
        """Forget a front-end process that is gone."""
        self._ended.pop(client_index, None)


def entries_of(output: SchedulerOutput) -> Iterator[tuple[int, int]]:
    """Per request scheduled: tokens computed before, tokens computed now. A decode with drafts to verify is a decode:
    one token.
    """
    drafts = output.scheduled_spec_decode_tokens
    counts = {name: n - len(drafts.get(name, ())) for name, n in output.num_scheduled_tokens.items()}
    for request in output.scheduled_new_reqs:
        yield request.num_computed_tokens, counts[request.req_id]
    cached = output.scheduled_cached_reqs
    for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield computed, counts[request_id]


def features_of(entries: Iterable[tuple[int, int]]) -> tuple[int, int, int, int, float]:
    """
    The fields of `BatchFeatures` from (computed before, computed now); one token is a decode, more are a chunk of a
    prompt.
    """
    n_decode = kv_tokens = kv_tokens_max = prefill_tokens = 0
    attention = 0.0
    for computed, new in entries:
        if new == 1:
            n_decode += 1
            kv_tokens += computed + 1
            kv_tokens_max = max(kv_tokens_max, computed + 1)
        else:
            prefill_tokens += new
            attention += new * computed + new * (new + 1) / 2
    return n_decode, kv_tokens, kv_tokens_max, prefill_tokens, attention
