"""What a policy records of arrivals and ends, so that its recent workloads see whole cohorts (`recent.py`)."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.adapt.recent import RecentWorkload, Unfinished
from cascadeinfer.core.events import WorkloadSeen
from cascadeinfer.core.types import RequestId
from cascadeinfer.core.view import RequestView


class WorkloadWatch:
    """Notifies several recent workloads (with different memories) of arrivals and ends; does nothing without any."""

    def __init__(self, workloads: Sequence[RecentWorkload]) -> None:
        """
        Args:
            workloads: The workloads to notify.
        """
        self._workloads = tuple(workloads)
        self._arrived_s: dict[RequestId, float] = {}
        self._elsewhere: dict[str, NDArray[np.float64]] = {}

    def arrived(self, request_id: RequestId, now_s: float) -> None:
        """A request arrived."""
        if self._workloads:
            self._arrived_s[request_id] = now_s
        for workload in self._workloads:
            workload.note_arrival(now_s)

    def finished(self, request: RequestView, output_tokens: int) -> None:
        """A request ended."""
        arrived_s = self._arrived_s.pop(request.request_id, None)
        if arrived_s is not None:
            for workload in self._workloads:
                workload.note_finished(request.prompt_tokens, output_tokens, arrived_s)

    def refused(self, request_id: RequestId) -> None:
        """A request will not run: it was demand, but has no length."""
        self._arrived_s.pop(request_id, None)

    def seen_elsewhere(self, event: WorkloadSeen, now_s: float) -> None:
        """Count another process's arrivals and ends like our own."""
        for workload in self._workloads:
            for _ in range(event.n_arrived):
                workload.note_arrival(now_s)
            for end in event.ended:
                workload.note_finished(end.prompt_tokens, end.output_tokens, end.arrived_s)
        rows = [(r.arrived_s, r.prompt_tokens, r.output_tokens, r.max_output_tokens) for r in event.unfinished]
        self._elsewhere[event.source] = np.array(rows, dtype=np.float64).reshape(-1, 4)

    def unfinished(self, requests: Iterable[RequestView]) -> Unfinished:
        """Those of these requests that have not ended, plus the latest such list from each other process."""
        arrived_s = self._arrived_s
        here = [request for request in requests if request.request_id in arrived_s]
        own = [
            (arrived_s[r.request_id], r.prompt_tokens, r.tokens - r.prompt_tokens, r.max_output_tokens) for r in here
        ]
        table = np.concatenate([np.array(own, dtype=np.float64).reshape(-1, 4), *self._elsewhere.values()])
        prompts, outputs, caps = table[:, 1:].T.astype(np.int64)
        return Unfinished(table[:, 0], prompts, outputs, caps)
