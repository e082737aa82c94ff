"""
The workload as the planner sees it: what happens at each sequence length.

A request with prompt P and output O prefills its prompt in the bucket of P (its first token comes with the prefill) and
then does one decode step at each length P+1 .. P+O-1; a step at length L reads L tokens of KV cache. Lengths are cut
into log-spaced buckets `[edge, next edge)`; each bucket holds sums over requests (`Column`), and a snapshot holds their
prefix sums, so any range of whole buckets costs O(1). Columns are additive: histograms merge by adding and age by
multiplying, and adding a request touches only the buckets it passes through.

Hand-overs need no column: the requests that cross an edge e are those that start below e minus those whose last decode
step lies below e (`STARTS` and `LAST_STEPS`).

Requests are weighted in three ways, because a mean over requests weighs a step by what the mean divides by: plain (1),
by output (1/O, "NL": normalised latency) and by decode steps (1/(O-1), "TPOT"; 0 when O = 1).
"""

from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.types import LengthRange

DEFAULT_MAX_TOKENS: Final = 1 << 20
"""Longest sequence a histogram takes by default; above every served context known to us."""
DEFAULT_BUCKETS_PER_OCTAVE: Final = 16
"""Edges 4.4 % apart: finer than the planner can tell layouts apart, yet only 260 edges up to 128K."""


class Columns(NamedTuple):
    """Row numbers of the sums per length bucket, also read by compiled code. A is prefill attention, P (P + 1) / 2."""

    STEPS: int = 0
    """Decode steps at lengths in the bucket."""
    KV_STEPS: int = 1
    """KV tokens read by those steps: sum of their lengths."""
    STARTS: int = 2
    """Requests whose prompt length is in the bucket."""
    PROMPT: int = 3
    """Prompt tokens of the requests that start here: prefill work."""
    ATTENTION: int = 4
    """Their prefill attention A."""
    PROMPT_SQ: int = 5
    """Sum of P^2; with the next two rows, the second moment of prefill time."""
    PROMPT_ATTENTION: int = 6
    """Sum of P A."""
    ATTENTION_SQ: int = 7
    """Sum of A^2."""
    LAST_STEPS: int = 8
    """Requests whose last decode step (or prompt, when O = 1) is at a length in the bucket."""
    ENDS: int = 9
    """Requests whose full length P + O is in the bucket."""
    STEPS_NL: int = 10
    """Decode steps, each weighted by 1/O."""
    KV_STEPS_NL: int = 11
    """KV tokens read, weighted by 1/O."""
    STARTS_NL: int = 12
    """Starts weighted by 1/O."""
    PROMPT_NL: int = 13
    """Prompt tokens weighted by 1/O."""
    ATTENTION_NL: int = 14
    """Prefill attention weighted by 1/O."""
    DECODING_STARTS_NL: int = 15
    """The same without one-token requests, which never decode."""
    LAST_STEPS_NL: int = 16
    """Last decode steps weighted by 1/O."""
    STEPS_TPOT: int = 17
    """Decode steps weighted by 1/(O-1)."""
    STARTS_TPOT: int = 18
    """Starts weighted by 1/(O-1)."""
    LAST_STEPS_TPOT: int = 19
    """Last decode steps weighted by 1/(O-1)."""
    DECODING_STARTS: int = 20
    """Starts without one-token requests."""


Column: Final = Columns()
N_COLUMNS: Final = len(Column)


@lru_cache(maxsize=8)
def log_edges(max_tokens: int, buckets_per_octave: int) -> NDArray[np.int64]:  # (n_buckets + 1,)
    """
    Edges of the buckets: 0, then 1, 2, 3 ... while the spacing is below one token, then log-spaced, and `max_tokens +
    1`.

    Raises:
        PlanError: `max_tokens` or `buckets_per_octave` is below 1.
    """
    if max_tokens < 1 or buckets_per_octave < 1:
        raise PlanError(
            f"a histogram needs max_tokens >= 1 and buckets_per_octave >= 1, not {max_tokens}, {buckets_per_octave}"
        )
    exponents = np.arange(0, int(np.ceil(np.log2(max_tokens + 1) * buckets_per_octave)) + 1) / buckets_per_octave
    inner = np.unique(np.rint(2.0**exponents).astype(np.int64))
    edges = np.concatenate(([0], inner[inner <= max_tokens], [max_tokens + 1]))
    edges.flags.writeable = False
    return edges


@njit(cache=True, error_model="numpy")
def _add_requests(
    edges: NDArray[np.int64],
    prompts: NDArray[np.int64],
    outputs: NDArray[np.int64],
    weights: NDArray[np.float64],
    sums: NDArray[np.float64],  # (N_COLUMNS, n_buckets)
) -> None:
    """Add requests to the sums of each bucket they pass through."""
    for i in range(len(prompts)):
        p = float(prompts[i])
        o = float(outputs[i])
        a = p * (p + 1.0) / 2.0
        decodes = o > 1.0
        w = weights[i]
        by_output = w / o
        by_steps = w / (o - 1.0) if decodes else 0.0
        first = np.searchsorted(edges, prompts[i], side="right") - 1
        sums[Column.STARTS, first] += w
        sums[Column.PROMPT, first] += w * p
        sums[Column.ATTENTION, first] += w * a
        sums[Column.PROMPT_SQ, first] += w * p * p
        sums[Column.PROMPT_ATTENTION, first] += w * p * a
        sums[Column.ATTENTION_SQ, first] += w * a * a
        sums[Column.STARTS_NL, first] += by_output
        sums[Column.PROMPT_NL, first] += p * by_output
        sums[Column.ATTENTION_NL, first] += a * by_output
        sums[Column.DECODING_STARTS_NL, first] += by_output if decodes else 0.0
        sums[Column.STARTS_TPOT, first] += by_steps
        sums[Column.DECODING_STARTS, first] += w if decodes else 0.0
        end = prompts[i] + outputs[i]  # decode steps are at lengths prompt + 1 .. end - 1
        bucket = first
        low = prompts[i] + 1
        while low < end:
            while edges[bucket + 1] <= low:
                bucket += 1
            high = min(end, edges[bucket + 1])
            steps = float(high - low)
            kv = steps * (low + high - 1) / 2.0
            sums[Column.STEPS, bucket] += w * steps
            sums[Column.KV_STEPS, bucket] += w * kv
            sums[Column.STEPS_NL, bucket] += steps * by_output
            sums[Column.KV_STEPS_NL, bucket] += kv * by_output
            sums[Column.STEPS_TPOT, bucket] += steps * by_steps
            low = high
        sums[Column.LAST_STEPS, bucket] += w
        sums[Column.LAST_STEPS_NL, bucket] += by_output if decodes else 0.0
        sums[Column.LAST_STEPS_TPOT, bucket] += by_steps
        sums[Column.ENDS, bucket if end < edges[bucket + 1] else bucket + 1] += w


@dataclass(frozen=True, slots=True, eq=False)
class LengthHistogram:
    """
    An immutable snapshot.

    Attributes:
        edges_tokens: Bucket i is `[edges_tokens[i], edges_tokens[i + 1])`.  # (n_buckets + 1,)
        prefix: Per request, column sums over the buckets below each edge; row `Column.STARTS` ends at 1.
            # (N_COLUMNS, n_buckets + 1)
        requests: Total weight of the requests (their number, unless aged).
    """

    edges_tokens: NDArray[np.int64]
    prefix: NDArray[np.float64]
    requests: float

    @classmethod
    def from_requests(
        cls,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        buckets_per_octave: int = DEFAULT_BUCKETS_PER_OCTAVE,
    ) -> "LengthHistogram":
        """
        The histogram of these requests.

        Raises:
            PlanError: There are no requests, the columns differ in length, or a length is not a whole number >= 1 or
                exceeds `max_tokens`.
        """
        builder = HistogramBuilder(max_tokens=max_tokens, buckets_per_octave=buckets_per_octave)
        builder.add_many(prompt_tokens, output_tokens)
        return builder.snapshot()

    def total(self, column: int, lengths: LengthRange | None = None) -> float:
        """
        Sum of a column per request, over the buckets from that of `lo` up to that of `hi` (exclusive).

        Raises:
            PlanError: An end of the range is not on an edge.
        """
        if lengths is None:
            return float(self.prefix[column, -1])
        lo = self.edge_index(lengths.lo_tokens)
        hi = self.edge_index(lengths.hi_tokens)
        return float(self.prefix[column, hi] - self.prefix[column, lo])

    def edge_index(self, length_tokens: int) -> int:
        """
        Index of the edge at this length; lengths beyond the last edge map to it.

        Raises:
            PlanError: There is no edge there.
        """
        index = int(np.searchsorted(self.edges_tokens, length_tokens))
        if index >= len(self.edges_tokens):
            return len(self.edges_tokens) - 1
        if int(self.edges_tokens[index]) != length_tokens:
            raise PlanError(f"{length_tokens} tokens is not a bucket edge of this histogram")
        return index

    def nearest_edge(self, length_tokens: int) -> int:
        """Index of the edge nearest to this length; the lower one of two."""
        return int(np.argmin(np.abs(self.edges_tokens - length_tokens)))

    @property
    def hand_overs(self) -> NDArray[np.float64]:  # (n_buckets + 1,)
        """Hand-overs per request if this edge were a boundary, for each edge."""
        crossing: NDArray[np.float64] = self.prefix[Column.STARTS] - self.prefix[Column.LAST_STEPS]
        return crossing

    @property
    def longest_tokens(self) -> int:
        """Upper edge of the last bucket in which a request ends, less one; no request was longer."""
        occupied = np.flatnonzero(np.diff(self.prefix[Column.ENDS]) > 0.0)
        return int(self.edges_tokens[occupied[-1] + 1]) - 1

    @property
    def mean_prompt_tokens(self) -> float:
        """Prompt tokens per request."""
        return self.total(Column.PROMPT)

    @property
    def mean_output_tokens(self) -> float:
        """Output tokens per request: its decode steps and the one token that comes with the prefill."""
        return self.total(Column.STEPS) + 1.0


class HistogramBuilder:
    """
    The mutable side: add requests as they finish, let the past fade, take snapshots.

    Adding a request costs O(buckets it passes through).

    Attributes:
        edges_tokens: Edges of the buckets.  # (n_buckets + 1,)
        sums: Rows as in `Column`, weighted by age.  # (N_COLUMNS, n_buckets)
    """

    def __init__(
        self, *, max_tokens: int = DEFAULT_MAX_TOKENS, buckets_per_octave: int = DEFAULT_BUCKETS_PER_OCTAVE
    ) -> None:
        """
        Args:
            max_tokens: Longest prompt + output accepted.
            buckets_per_octave: Edges per doubling of length.

        Raises:
            PlanError: Either is below 1.
        """
        self.edges_tokens = log_edges(max_tokens, buckets_per_octave)
        self.sums = np.zeros((N_COLUMNS, len(self.edges_tokens) - 1))
        self._max_tokens = max_tokens
        self._prompt = np.zeros(1, dtype=np.int64)
        self._output = np.zeros(1, dtype=np.int64)
        self._weight = np.ones(1)

    @property
    def requests(self) -> float:
        """Total weight of the requests in it."""
        return float(self.sums[Column.STARTS].sum())

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """
        Add one finished request.

        Raises:
            TypeError: A length is not an integer.
            PlanError: A length is below 1, or their sum is beyond `max_tokens`.
        """
        prompt, output = index(prompt_tokens), index(output_tokens)
        if min(prompt, output) < 1 or prompt + output > self._max_tokens:
            self.add_many([prompt], [output])  # raises an error that names the fault
            return
        self._prompt[0], self._output[0] = prompt, output  # runs once per request, so no arrays are built
        _add_requests(self.edges_tokens, self._prompt, self._output, self._weight, self.sums)

    def add_many(
        self, prompt_tokens: ArrayLike, output_tokens: ArrayLike, weights: NDArray[np.float64] | None = None
    ) -> None:
        """
        Add requests, each with its weight (1 by default). If one is refused, nothing is added.

        Raises:
            PlanError: The columns differ in length, a weight is negative or not finite, a length is not a whole number
                >= 1, or a sum exceeds `max_tokens`.
        """
        prompts = _whole(prompt_tokens, "prompt_tokens")
        outputs = _whole(output_tokens, "output_tokens")
        if prompts.shape != outputs.shape:
            raise PlanError(f"{len(prompts)} prompt lengths but {len(outputs)} output lengths")
        too_long = np.flatnonzero(prompts > self._max_tokens - outputs)
        if len(too_long):
            i = int(too_long[0])
            raise PlanError(
                f"request {i}: {prompts[i]} + {outputs[i]} tokens is longer than the histogram's "
                f"{self._max_tokens} tokens"
            )
        each = np.ones(len(prompts)) if weights is None else weights
        if each.shape != prompts.shape or not np.all(np.isfinite(each) & (each >= 0.0)):
            raise PlanError("weights are finite numbers >= 0, one per request")
        _add_requests(self.edges_tokens, prompts, outputs, each, self.sums)

    def decay(self, factor: float) -> None:
        """
        Multiply the weight of everything so far.

        Raises:
            PlanError: The factor is not in [0, 1].
        """
        if not 0.0 <= factor <= 1.0:
            raise PlanError(f"a decay factor lies in [0, 1], not {factor}")
        self.sums *= factor

    def merge(self, other: "HistogramBuilder") -> None:
        """
        Add another histogram to this one.

        Raises:
            PlanError: Its buckets differ.
        """
        if not np.array_equal(self.edges_tokens, other.edges_tokens):
            raise PlanError("histograms with different buckets do not merge")
        self.sums += other.sums

    def snapshot(self) -> LengthHistogram:
        """
        An immutable copy with prefix sums, per request.

        Raises:
            PlanError: It is empty.
        """
        requests = self.requests
        if not requests > 0.0:
            raise PlanError("the histogram is empty: no requests to plan for")
        prefix = np.zeros((N_COLUMNS, len(self.edges_tokens)))
        np.cumsum(self.sums / requests, axis=1, out=prefix[:, 1:])
        prefix.flags.writeable = False
        return LengthHistogram(self.edges_tokens, prefix, requests)


def _whole(values: ArrayLike, name: str) -> NDArray[np.int64]:
    """The values as a vector of whole numbers >= 1, or a PlanError that names the first that is not."""
    raw = np.atleast_1d(np.asarray(values))
    if raw.ndim != 1 or raw.dtype.kind not in "iuf":
        raise PlanError(f"{name} must be a sequence of numbers")
    bad = np.flatnonzero(~(np.isfinite(raw) & (raw >= 1) & (raw == np.floor(raw)) & (raw < 2**53)))
    if len(bad):
        raise PlanError(f"{name}[{int(bad[0])}] is {raw[bad[0]]}: lengths are whole numbers >= 1")
    return raw.astype(np.int64)
