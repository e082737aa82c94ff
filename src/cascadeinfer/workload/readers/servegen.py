"""
ServeGen (github alibaba/ServeGen, NSDI'26): not a list of requests but laws per client, from which a trace is drawn.

There are two files per client. `chunk-<id>-trace.csv`, without header: window start in seconds, rate in requests/s,
coefficient of variation, law of the gaps (`Gamma`, `Weibull`, empty when idle), its two arguments (shape first).
`chunk-<id>-dataset.json`: window start -> `{"input_tokens": "{length: probability, ...}", "output_tokens": ...}`, the
inner dicts written as Python literals.

Drawing: per client and window a stationary renewal process at the published rate and shape (`renewal_window`), prompt
and output independently from the published laws. (ServeGen's own generator uses one random number for both, which
correlates them.)
"""

import ast
import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.arrivals import renewal_window
from cascadeinfer.workload.lengths import Empirical
from cascadeinfer.workload.readers.fields import csv_rows, real
from cascadeinfer.workload.trace import Trace

LAWS: Final = {"Gamma": "gamma", "Weibull": "weibull", "Exponential": "exponential"}


@dataclass(frozen=True, slots=True)
class ArrivalWindow:
    """A client's arrivals from `start_s` to the next window: gaps of this law and shape, `rate_rps` on average."""

    start_s: float
    rate_rps: float
    law: str
    shape: float


@dataclass(frozen=True, slots=True)
class LengthWindow:
    """A client's lengths from `start_s` to the next window."""

    start_s: float
    prompt: Empirical
    output: Empirical


@dataclass(frozen=True, slots=True)
class Client:
    """One client: rate and lengths of its requests over the day."""

    client_id: int
    arrivals: tuple[ArrivalWindow, ...]
    lengths: tuple[LengthWindow, ...]


def parse_client(client_id: int, trace_lines: Iterable[str], dataset: str | bytes) -> Client:
    """
    Parse one client's two files.

    Raises:
        TraceError: A line does not have six fields, a number is wrong, a law is unknown, windows are out of order, or a
            length law is invalid.
    """
    arrivals: list[ArrivalWindow] = []
    reader = csv.reader(trace_lines)
    for row in csv_rows(reader):
        line = reader.line_num
        if len(row) != 6:
            raise TraceError(f"{len(row)} fields instead of 6", line=line)
        start_s = real(row[0], "timestamp", line)
        if arrivals and start_s <= arrivals[-1].start_s:
            raise TraceError(f"window {row[0]} is not after the one above", line=line)
        if not row[3].strip():
            arrivals.append(ArrivalWindow(start_s, 0.0, "exponential", 1.0))
            continue
        if row[3] not in LAWS:
            raise TraceError(f"unknown law of gaps {row[3]!r}: one of {sorted(LAWS)}", line=line)
        rate_rps, shape = real(row[1], "rate", line), real(row[4], "shape", line)
        if rate_rps < 0.0 or shape <= 0.0:
            raise TraceError(f"rate {row[1]} or shape {row[4]} is out of range", line=line)
        arrivals.append(ArrivalWindow(start_s, rate_rps, LAWS[row[3]], shape))
    return Client(client_id, tuple(arrivals), _length_windows(dataset))


def draw_trace(
    clients: Sequence[Client], start_s: float, end_s: float, rng: np.random.Generator, *, rate_scale: float = 1.0
) -> Trace:
    """
    A trace of all clients over `[start_s, end_s)` of the published day, times from its start.

    Args:
        clients: Drawn in order of id, so that the result depends on the generator only.
        start_s: On the published clock.
        end_s: On the published clock.
        rng: Source of randomness.
        rate_scale: Multiplies every client's rate.

    Raises:
        TraceError: The window is empty, a client sends requests before its first length law, or nothing was drawn.
    """
    if not start_s < end_s:
        raise TraceError(f"the window [{start_s}, {end_s}) is empty")
    times: list[NDArray[np.float64]] = []
    prompts: list[NDArray[np.int64]] = []
    outputs: list[NDArray[np.int64]] = []
    for client in sorted(clients, key=lambda c: c.client_id):
        length_starts = [window.start_s for window in client.lengths]
        for index, window in enumerate(client.arrivals):
            is_last = index + 1 == len(client.arrivals)
            lo_s = max(window.start_s, start_s)
            hi_s = end_s if is_last else min(client.arrivals[index + 1].start_s, end_s)
            if lo_s >= hi_s or window.rate_rps <= 0.0:
                continue
            law = "gamma" if window.law == "exponential" else window.law
            shape = 1.0 if window.law == "exponential" else window.shape
            drawn_s = renewal_window(law, shape, window.rate_rps * rate_scale, hi_s - lo_s, rng)
            at = bisect_right(length_starts, window.start_s) - 1
            if at < 0:
                raise TraceError(f"client {client.client_id} asks at {window.start_s} s, before its first length law")
            times.append(drawn_s + (lo_s - start_s))
            prompts.append(client.lengths[at].prompt.draw(len(drawn_s), rng))
            outputs.append(client.lengths[at].output.draw(len(drawn_s), rng))
    if not times or not sum(map(len, times)):
        raise TraceError("no client asks in this window")
    all_s = np.concatenate(times)
    order = np.argsort(all_s, kind="stable")
    return Trace.from_columns(
        np.concatenate(prompts)[order], np.concatenate(outputs)[order], np.asarray(all_s[order], dtype=np.float64)
    )


def _length_windows(dataset: str | bytes) -> tuple[LengthWindow, ...]:
    try:
        published = msgspec.json.decode(dataset, type=dict[str, dict[str, str]])
    except msgspec.DecodeError as error:
        raise TraceError(f"the dataset is not JSON of the expected shape: {error}") from None
    windows: list[LengthWindow] = []
    for start, laws in published.items():
        missing = [name for name in ("input_tokens", "output_tokens") if name not in laws]
        if missing:
            raise TraceError(f"window {start}: no law {missing[0]!r}")
        prompt, output = (_law(laws[name], f"window {start}: {name}") for name in ("input_tokens", "output_tokens"))
        if prompt is not None and output is not None:  # an empty law means that nothing was seen in the window
            windows.append(LengthWindow(real(start, "window start", 1), prompt, output))
    windows.sort(key=lambda window: window.start_s)
    return tuple(windows)


def _law(text: str, where: str) -> Empirical | None:
    try:
        pairs = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: deeply nested text
        pairs = None
    if not isinstance(pairs, dict) or not all(
        isinstance(k, int) and isinstance(v, int | float) and math.isfinite(v) and k >= 0 and v >= 0
        for k, v in pairs.items()
    ):
        raise TraceError(f"{where} is not a dict of lengths and probabilities")
    # A published length of 0 is a request that produced nothing, which cannot be served.
    kept = {length: probability for length, probability in pairs.items() if length >= 1}
    if not kept or sum(kept.values()) <= 0.0:
        return None
    return Empirical(np.array(list(kept), dtype=np.int64), np.array(list(kept.values()), dtype=np.float64))
