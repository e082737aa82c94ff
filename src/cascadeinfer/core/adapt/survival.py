"""
Distribution of output lengths, from finished and running requests: the Kaplan-Meier estimator.

Source: E. L. Kaplan, P. Meier, *Nonparametric estimation from incomplete observations*, JASA 53 (1958). In each bucket
of output lengths the hazard is the weight of requests that ended there over the weight of those that got there; running
requests have got as far as they are. Beyond the longest finished output nothing is known except that requests run
there, so survival is assumed to fall as one over the length (a Pareto tail of index 1: the median request there doubles
its length).
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import DEFAULT_BUCKETS_PER_OCTAVE, log_edges

MOST_FACTOR: Final = 2.0
"""Outputs are assumed not to exceed this multiple of the longest known output or of the request's own output so far."""


class OutputSurvival:
    """Weights of ended requests by output length, aged by `decay`."""

    def __init__(self, max_tokens: int) -> None:
        """
        Args:
            max_tokens: Longest output.
        """
        self._edges = log_edges(max_tokens, DEFAULT_BUCKETS_PER_OCTAVE)
        self._ended = np.zeros(len(self._edges) - 1)

    def add(self, output_tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        """Add requests that ended."""
        np.add.at(self._ended, self._bucket_of(output_tokens), weights)

    def decay(self, factor: float) -> None:
        """Multiply the weight of everything so far."""
        self._ended *= factor

    def quantiles(
        self, so_far_tokens: NDArray[np.int64], weights: NDArray[np.float64], levels: Sequence[float]
    ) -> Iterator[NDArray[np.int64]]:
        """
        Outputs that running requests may reach.

        Args:
            so_far_tokens: Output of each request so far.
            weights: Weight of each request in the estimate.
            levels: Quantiles wanted, in (0, 1).

        Yields:
            Per level, the output length of each request at that quantile of its future; longer than its output so far.
        """
        survival = self._survival(so_far_tokens, weights)
        bucket = self._bucket_of(so_far_tokens)
        fallen = -survival  # increasing
        reached = survival[bucket]
        least = survival[-1]
        ended = np.flatnonzero(self._ended)
        tail_tokens = np.maximum(so_far_tokens, self._edges[ended[-1] + 1] if len(ended) else 0).astype(np.float64)
        for level in levels:
            target = (1.0 - level) * reached
            index = np.minimum(np.searchsorted(fallen, -target, side="left"), len(self._edges) - 1)
            known = self._within(survival, index, target)
            factor = np.divide(least, target, out=np.full_like(target, 1.0 / (1.0 - level)), where=target > 0.0)
            outputs = np.where(target > least, known, tail_tokens * np.minimum(factor, MOST_FACTOR))
            yield np.maximum(np.rint(outputs).astype(np.int64), so_far_tokens + 1)

    def unknown(self, so_far_tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> float:
        """
        Share of requests that outlive everything known, so that any statement about their length is a guess; 1.0 when
        nothing has ended.

        Args:
            so_far_tokens: Output so far of each running request.
            weights: Weight of each.
        """
        return float(self._survival(so_far_tokens, weights)[-1])

    def _survival(self, so_far_tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of requests that get as far as each edge."""
        running = np.zeros_like(self._ended)
        np.add.at(running, self._bucket_of(so_far_tokens), weights)
        at_risk = np.cumsum((self._ended + running)[::-1])[::-1] - 0.5 * running
        hazard = np.divide(self._ended, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0.0)
        return np.concatenate(([1.0], np.cumprod(1.0 - np.minimum(hazard, 1.0))))

    def _within(
        self, survival: NDArray[np.float64], index: NDArray[np.int64], target: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """
        Lengths at which survival falls to the targets, linear inside buckets. `index` is the first edge at or below its
        target.
        """
        below = np.maximum(index - 1, 0)
        drop = survival[below] - survival[index]
        part = np.divide(survival[below] - target, drop, out=np.ones_like(target), where=drop > 0.0)
        edges = self._edges.astype(np.float64)
        return np.asarray(edges[below] + part * (edges[index] - edges[below]))

    def _bucket_of(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(np.clip(np.searchsorted(self._edges, tokens, side="right") - 1, 0, len(self._ended) - 1))
