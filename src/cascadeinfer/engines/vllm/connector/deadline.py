"""
Deadlines of pulls: the source guarantees its pin only until then.

The front end sends the deadline with the resumed request (`PULL_BEFORE`), on the clock of this instance's machine
(`time.monotonic`, the same for all its processes). The instance may be stopped at any moment, so the deadline is
checked three times: before the pull is scheduled, in the worker before it reads, and, decisively, in the worker after
it has read. Only the last check covers what happened in between: a read seen to be complete in time was complete in
time. Each rank checks its own part, and vLLM treats the request's pull as failed when any rank reports a failure.

A late pull has failed: vLLM (`kv_load_failure_policy="recompute"`) recomputes the KV cache, and its prefix cache learns
of blocks only when their load has succeeded.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from cascadeinfer.engines.vllm.connector.ticket import PULL_BEFORE, TransferParams

_ATTRIBUTE: Final = "cascade_pull_before_s"


def is_over(params: TransferParams, clock: Callable[[], float] = time.monotonic) -> bool:
    """Whether the deadline for a pull with these parameters has passed."""
    before_s = params.get(PULL_BEFORE)
    return before_s is not None and clock() >= before_s


def attach_deadlines(metadata: KVConnectorMetadata, pulls: Iterable[tuple[str, TransferParams]]) -> None:
    """Pass the deadlines of the pulls that begin with this step to the workers."""
    deadlines = {request_id: params[PULL_BEFORE] for request_id, params in pulls if PULL_BEFORE in params}
    setattr(metadata, _ATTRIBUTE, deadlines)


class PullDeadlines:
    """A worker's current pulls that have a deadline."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty; `clock` gives seconds."""
        self._clock = clock
        self._before_s: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of deadlines kept."""
        return len(self._before_s)

    def learn(self, metadata: KVConnectorMetadata) -> None:
        """Take over the deadlines attached by the scheduler's half."""
        self._before_s.update(getattr(metadata, _ATTRIBUTE, {}))

    def expect(self, request_id: str, before_s: float | None) -> None:
        """A pull begins here that has this deadline, if any."""
        if before_s is not None:
            self._before_s[request_id] = before_s

    def have_passed(self, request_id: str) -> bool:
        """Whether this pull's deadline has passed."""
        before_s = self._before_s.get(request_id)
        return before_s is not None and self._clock() >= before_s

    def late(self, complete: Iterable[str]) -> set[str]:
        """Those of the just completed pulls whose deadline has passed by now."""
        return {request_id for request_id in complete if self.have_passed(request_id)}

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forget pulls that have ended, well or not."""
        for request_id in request_ids:
            self._before_s.pop(request_id, None)
