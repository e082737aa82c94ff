"""
The workload of late: lengths of what has finished, and how much has arrived; the past fades exponentially.

Requests that run for long have not finished when the first looks are taken, so early looks see too many short ones; later ones mend
that. Finished requests are gathered in a list and enter the histogram at the next look: a finish costs next to nothing.
"""

import math

from cascadeinfer.core.plan.histogram import HistogramBuilder, LengthHistogram


class RecentWorkload:
    """A fading histogram of lengths and a fading arrival rate."""

    def __init__(self, memory_s: float, max_tokens: int) -> None:
        """
        Args:
            memory_s: Time constant with which the past fades.
            max_tokens: Longest sequence; longer ones are left out.
        """
        self._memory_s = memory_s
        self._max_tokens = max_tokens
        self._builder = HistogramBuilder(max_tokens=max_tokens)
        self._finished: list[tuple[int, int]] = []
        self._new_arrivals = 0
        self._arrivals = 0.0
        self._watched_s = 0.0
        self._since_s: float | None = None

    def note_arrival(self, now_s: float) -> None:
        """A request came. The first one starts the clock."""
        if self._since_s is None:
            self._since_s = now_s
        self._new_arrivals += 1

    def note_finished(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request ended; one without output is no length to plan for."""
        if output_tokens >= 1 and prompt_tokens + output_tokens < self._max_tokens:
            self._finished.append((prompt_tokens, output_tokens))

    def look(self, now_s: float, min_requests: float) -> tuple[LengthHistogram, float] | None:
        """
        What the workload is now.

        Args:
            now_s: The time; not before that of the last look.
            min_requests: Fewest finished requests to say anything from.

        Returns:
            Lengths, and requests per second (positive); None when too little has been seen.
        """
        if self._since_s is None or now_s <= self._since_s:
            return None
        span_s = now_s - self._since_s
        self._since_s = now_s
        fade = math.exp(-span_s / self._memory_s)
        self._builder.decay(fade)
        if self._finished:
            prompts, outputs = zip(*self._finished, strict=True)
            self._builder.add_many(prompts, outputs)
            self._finished.clear()
        self._arrivals = fade * self._arrivals + self._new_arrivals
        self._watched_s = fade * self._watched_s + span_s
        self._new_arrivals = 0
        if self._builder.requests < max(min_requests, 1.0) or self._arrivals <= 0.0:
            return None
        return self._builder.snapshot(), self._arrivals / self._watched_s
