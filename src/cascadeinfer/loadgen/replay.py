"""
Open-loop replay of a trace on a live server: requests are sent at their times, however the server does.

A closed loop, in which the next request waits for an answer, sends less to a slow server and so hides its slowness.
Latencies count from the time at which a request was due, so that a client too slow to send it does not hide that
either; its lateness is recorded (`dispatched_s`).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from cascadeinfer.loadgen.client import Answer, OpenAiClient
from cascadeinfer.loadgen.prompts import PromptMaker
from cascadeinfer.results.records import RequestRecords
from cascadeinfer.workload.trace import Trace

LEAD_S: Final = 0.2
"""Time from the start of the replay to the trace's time 0, so that its first requests are not late."""
LONGEST_BURST_S: Final = 0.02
"""Requests that are due are sent for at most this long before the streams get a turn."""
INTERRUPTED: Final = "interrupted: the replay was ended before its answer was complete"


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """
    The result of a replay.

    Attributes:
        records: One row per request.
        errors: Per request, what went wrong (`kind: detail`); empty when nothing did.
        ended_early: Requests that the server ended before their length (it does not know `ignore_eos`); they count with
            their own length.
        off_prompts: Requests whose prompt length the server counts differently from the trace.
        counted_by_chunks: Requests for which the server sent no usage.
        interrupted: Whether the operator ended it; the rows are then the requests that had been sent.
    """

    records: RequestRecords
    errors: tuple[str, ...]
    ended_early: int
    off_prompts: int
    counted_by_chunks: int
    interrupted: bool = False


async def replay(
    trace: Trace,
    client: OpenAiClient,
    prompts: PromptMaker,
    *,
    timeout_s: float,
    name: str,
    on_end: Callable[[Answer], None] = lambda _: None,
) -> Replay:
    """
    Send every request of the trace at its time and wait for all to end.

    A cancellation (Ctrl-C) ends it early with the results so far: hours of measurement are not lost for their last
    minute.

    Args:
        trace: A trace with arrival times.
        client: A client of the server.
        prompts: Prompts of this trace.
        timeout_s: After this long a request's client gives up.
        name: Name of the run; prefix of the request ids.
        on_end: Called with each answer, for progress.
    """
    trace.require_arrivals()
    loop = asyncio.get_running_loop()
    answers: list[Answer] = []
    start_s = loop.time() + LEAD_S

    def now_s() -> float:
        return loop.time() - start_s

    async def one(row: int, body: bytes, output_tokens: int) -> None:
        answers[row] = await client.stream(body, output_tokens, now_s, timeout_s=timeout_s, request_id=f"{name}-{row}")
        on_end(answers[row])

    interrupted = False
    turned_s = now_s()
    try:
        async with asyncio.TaskGroup() as group:
            for row in range(len(trace)):
                output_tokens = int(trace.output_tokens[row])
                body = client.body(prompts.prompt(row), output_tokens)
                # Requests that are due are sent together: with many streams, one turn of the event loop may take longer
                # than the time between two requests.
                early_s = float(trace.arrival_s[row]) - now_s()
                if early_s > 0.0 or now_s() - turned_s > LONGEST_BURST_S:
                    await asyncio.sleep(max(0.0, early_s))
                    turned_s = now_s()
                answers.append(Answer(sent_s=now_s(), error=INTERRUPTED))  # until it ends
                group.create_task(one(row, body, output_tokens))
    except asyncio.CancelledError:
        if not answers:
            raise
        interrupted = True
    return replace(_collect(trace.rows(np.arange(len(answers))), answers), interrupted=interrupted)


def _collect(trace: Trace, answers: Sequence[Answer]) -> Replay:
    """Convert answers to columns."""
    n = len(answers)
    good = np.array([not a.error for a in answers])
    produced = np.array([a.produced_tokens for a in answers], dtype=np.int64)
    counted = np.array([a.prompt_tokens for a in answers], dtype=np.int64)
    early = good & (produced < trace.output_tokens)
    last = np.array([a.last_token_s for a in answers], dtype=np.float64)
    records = RequestRecords(
        arrival_s=np.array(trace.arrival_s),
        dispatched_s=np.array([a.sent_s for a in answers], dtype=np.float64),
        scheduled_s=np.full(n, np.nan),
        first_token_s=np.array([a.first_token_s for a in answers], dtype=np.float64),
        finish_s=np.where(good, last, np.nan),
        prompt_tokens=np.where(counted > 0, counted, trace.prompt_tokens),
        output_tokens=np.where(early, np.maximum(produced, 1), trace.output_tokens),
        produced_tokens=produced,
        migrations=np.zeros(n, dtype=np.int64),
        preemptions=np.zeros(n, dtype=np.int64),
        recomputed_tokens=np.zeros(n, dtype=np.int64),
        prefix_hit_tokens=np.array([a.cached_tokens for a in answers], dtype=np.int64),
        rejected=np.array([a.refused for a in answers], dtype=np.bool_),
        aborted=np.array([a.error.startswith("timed out") for a in answers], dtype=np.bool_),
    )
    return Replay(
        records,
        tuple(a.error for a in answers),
        ended_early=int(early.sum()),
        off_prompts=int(np.count_nonzero((counted > 0) & (counted != trace.prompt_tokens))),
        counted_by_chunks=int(sum(a.counted_by_chunks for a in answers if not a.error)),
    )
