"""
The recent workload: arrival rate and lengths, with the past fading exponentially.

Each request is weighted by the age of its arrival, whether it has finished or not, so that the window holds whole
cohorts. Counting only finished requests would under-represent long ones while they run, for minutes after a start or a
change. A running request enters with its prompt and with outputs that it may yet reach (`survival.py`), learnt from
requests that finished.

Finished requests are collected in a list and enter the histogram at the next look, so a finish costs next to nothing.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.adapt.survival import OutputSurvival
from cascadeinfer.core.cost.histogram import HistogramBuilder, LengthHistogram

QUANTILES: Final = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
"""A running request enters once per level, in equal parts, with that quantile of the output it may reach."""


@dataclass(frozen=True, slots=True, eq=False)
class Unfinished:
    """
    Requests that have arrived and not ended, in columns.

    Attributes:
        arrived_s: Time of arrival.
        prompt_tokens: Prompt length.
        output_tokens: Output so far, >= 0.
        max_output_tokens: The request's own cap, >= 1.
    """

    arrived_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    max_output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrived_s)


MOST_UNKNOWN: Final = 0.1
"""
Largest share of requests that may outlive all finished ones; above it the window is too young to plan from (a start, or
only long outputs).
"""

NOBODY: Final = Unfinished(np.empty(0), *(np.empty(0, dtype=np.int64) for _ in range(3)))


class RecentWorkload:
    """A fading histogram of lengths and a fading arrival rate."""

    def __init__(self, memory_s: float, max_tokens: int) -> None:
        """
        Args:
            memory_s: Time constant with which the past fades.
            max_tokens: Longest sequence; longer ones are ignored.
        """
        self._memory_s = memory_s
        self._max_tokens = max_tokens
        self._builder = HistogramBuilder(max_tokens=max_tokens)
        self._survival = OutputSurvival(max_tokens)
        self._finished: list[tuple[int, int, float]] = []
        self._seen = 0.0
        self._new_arrivals = 0
        self._arrivals = 0.0
        self._watched_s = 0.0
        self._since_s: float | None = None

    def note_arrival(self, now_s: float) -> None:
        """Record an arrival. The first one starts the clock."""
        if self._since_s is None:
            self._since_s = now_s
        self._new_arrivals += 1

    def note_finished(self, prompt_tokens: int, output_tokens: int, arrived_s: float) -> None:
        """Record the end of a request; one without output contributes no length."""
        if output_tokens >= 1 and prompt_tokens + output_tokens < self._max_tokens:
            self._finished.append((prompt_tokens, output_tokens, arrived_s))

    @property
    def n_finished(self) -> float:
        """Finished requests seen, faded up to the last look."""
        return self._seen + len(self._finished)

    def look(
        self,
        now_s: float,
        min_requests: float,
        unfinished: Unfinished = NOBODY,
        most_unknown: float = MOST_UNKNOWN,
    ) -> tuple[LengthHistogram, float] | None:
        """
        The current workload.

        Args:
            now_s: The time; not before that of the last look.
            min_requests: Fewest finished requests (faded) needed for an answer.
            unfinished: Requests running or waiting now.
            most_unknown: Largest share of requests that may outlive all that have finished.

        Returns:
            Lengths, and requests per second (positive); None while too few requests, or too few of their final lengths,
            have been seen.
        """
        if self._since_s is None or now_s <= self._since_s:
            return None
        span_s = now_s - self._since_s
        self._since_s = now_s
        fade = math.exp(-span_s / self._memory_s)
        self._take_in(fade, now_s)
        self._arrivals = fade * self._arrivals + self._new_arrivals
        self._watched_s = fade * self._watched_s + span_s
        self._new_arrivals = 0
        if self._seen < max(min_requests, 1.0) or self._arrivals <= 0.0:
            return None
        ages = self._weights(now_s, unfinished.arrived_s)
        if self._survival.unknown(unfinished.output_tokens, ages) > most_unknown:
            return None
        whole = HistogramBuilder(max_tokens=self._max_tokens)
        whole.merge(self._builder)
        self._foresee(whole, now_s, unfinished)
        if not whole.requests > 0.0:
            return None  # the finished requests arrived so long ago that they weigh nothing
        return whole.snapshot(), self._arrivals / self._watched_s

    def _take_in(self, fade: float, now_s: float) -> None:
        self._builder.decay(fade)
        self._survival.decay(fade)
        self._seen = fade * self._seen + len(self._finished)
        if self._finished:
            prompts, outputs, arrived_s = (np.array(column) for column in zip(*self._finished, strict=True))
            weights = self._weights(now_s, arrived_s)
            self._builder.add_many(prompts, outputs, weights)
            self._survival.add(outputs, weights)
            self._finished.clear()

    def _foresee(self, whole: HistogramBuilder, now_s: float, unfinished: Unfinished) -> None:
        """Add unfinished requests with the outputs they may reach."""
        fits = unfinished.prompt_tokens + unfinished.output_tokens + 1 < self._max_tokens
        if not np.any(fits):
            return
        prompts = unfinished.prompt_tokens[fits]
        so_far = unfinished.output_tokens[fits]
        weights = self._weights(now_s, unfinished.arrived_s[fits])
        most = np.minimum(unfinished.max_output_tokens[fits], self._max_tokens - 1 - prompts)
        for outputs in self._survival.quantiles(so_far, weights, QUANTILES):
            whole.add_many(
                prompts, np.maximum(np.minimum(outputs, most), np.maximum(1, so_far)), weights / len(QUANTILES)
            )

    def _weights(self, now_s: float, arrived_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.exp((arrived_s - now_s) / self._memory_s))
