"""What a policy notes of arrivals and ends, so that its recent workloads see whole cohorts (`recent.py`)."""

from collections.abc import Iterable, Sequence

import numpy as np

from cascadeinfer.core.balance.recent import RecentWorkload, Unfinished
from cascadeinfer.core.types import RequestId
from cascadeinfer.core.view import RequestView


class WorkloadWatch:
    """Tells several recent workloads (of different memory) what comes and goes. Without any it notes nothing."""

    def __init__(self, workloads: Sequence[RecentWorkload]) -> None:
        """
        Args:
            workloads: Those that are told.
        """
        self._workloads = tuple(workloads)
        self._arrived_s: dict[RequestId, float] = {}

    def arrived(self, request_id: RequestId, now_s: float) -> None:
        """A request came."""
        if self._workloads:
            self._arrived_s[request_id] = now_s
        for workload in self._workloads:
            workload.note_arrival(now_s)

    def finished(self, request: RequestView, output_tokens: int) -> None:
        """It ended."""
        arrived_s = self._arrived_s.pop(request.request_id, None)
        if arrived_s is not None:
            for workload in self._workloads:
                workload.note_finished(request.prompt_tokens, output_tokens, arrived_s)

    def refused(self, request_id: RequestId) -> None:
        """It will not run: it was demand, but has no length."""
        self._arrived_s.pop(request_id, None)

    def unfinished(self, requests: Iterable[RequestView]) -> Unfinished:
        """Those of these requests that have come and not ended."""
        arrived_s = self._arrived_s
        here = [request for request in requests if request.request_id in arrived_s]
        prompts = np.array([request.prompt_tokens for request in here], dtype=np.int64)
        return Unfinished(
            np.array([arrived_s[request.request_id] for request in here], dtype=np.float64),
            prompts,
            np.array([request.tokens for request in here], dtype=np.int64) - prompts,
            np.array([request.max_output_tokens for request in here], dtype=np.int64),
        )
