"""Records as the load generator writes them, from the columns that tests care about."""

from collections.abc import Iterable

import numpy as np

from cascadeinfer.results.records import RequestRecords


def live_records(
    arrival_s: Iterable[float],
    ttft_s: Iterable[float],
    e2e_s: Iterable[float],
    prompt_tokens: Iterable[int],
    output_tokens: Iterable[int],
) -> RequestRecords:
    """One row per request; NaN in `e2e_s` means that the request failed and produced nothing."""
    arrival = np.array(list(arrival_s), dtype=np.float64)
    finish = arrival + np.array(list(e2e_s), dtype=np.float64)
    n = len(arrival)
    outputs = np.array(list(output_tokens), dtype=np.int64)
    zeros = np.zeros(n, dtype=np.int64)
    return RequestRecords(
        arrival_s=arrival,
        dispatched_s=arrival,
        scheduled_s=np.full(n, np.nan),
        first_token_s=arrival + np.array(list(ttft_s), dtype=np.float64),
        finish_s=finish,
        prompt_tokens=np.array(list(prompt_tokens), dtype=np.int64),
        output_tokens=outputs,
        produced_tokens=np.where(np.isfinite(finish), outputs, 0),
        migrations=zeros,
        preemptions=zeros,
        recomputed_tokens=zeros,
        prefix_hit_tokens=zeros,
        rejected=np.zeros(n, dtype=np.bool_),
        aborted=np.zeros(n, dtype=np.bool_),
    )
