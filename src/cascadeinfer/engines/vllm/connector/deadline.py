"""
When a pull must be over: what the source pins for it is pinned no longer than that for sure.

The front end says with the resumed request (`PULL_BEFORE`) by when, on the clock of this instance's machine (`time.monotonic`, the same for
all its processes). The instance may be stopped at any moment, so it is looked at three times: before the pull is scheduled, in the worker
before it reads, and, what decides, in the worker after it has read. Only the last one sees what happened in between: a read that is seen
to be complete in time was complete in time. Each rank looks at its own part, and vLLM takes the request's pull as failed when one does.

A pull that is late has failed: vLLM (`kv_load_failure_policy="recompute"`) computes the KV cache anew, and its prefix cache learns of blocks
only when their load has succeeded.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from cascadeinfer.engines.vllm.connector.ticket import PULL_BEFORE, TransferParams

_ATTRIBUTE: Final = "cascade_pull_before_s"


def is_over(params: TransferParams, clock: Callable[[], float] = time.monotonic) -> bool:
    """Whether the time to pull with these parameters has passed."""
    before_s = params.get(PULL_BEFORE)
    return before_s is not None and clock() >= before_s


def attach_deadlines(metadata: KVConnectorMetadata, pulls: Iterable[tuple[str, TransferParams]]) -> None:
    """Tell the workers by when each of the pulls that begin with this step must be over."""
    deadlines = {request_id: params[PULL_BEFORE] for request_id, params in pulls if PULL_BEFORE in params}
    setattr(metadata, _ATTRIBUTE, deadlines)


class PullDeadlines:
    """A worker's pulls under way that have a deadline."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """None yet; `clock` gives seconds."""
        self._clock = clock
        self._before_s: dict[str, float] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._before_s)

    def learn(self, metadata: KVConnectorMetadata) -> None:
        """Take over what the scheduler's half has attached."""
        self._before_s.update(getattr(metadata, _ATTRIBUTE, {}))

    def have_passed(self, request_id: str) -> bool:
        """Whether this pull's time is over."""
        before_s = self._before_s.get(request_id)
        return before_s is not None and self._clock() >= before_s

    def late(self, complete: Iterable[str]) -> set[str]:
        """Of the pulls that have just been seen to be complete, those whose time was over by now."""
        return {request_id for request_id in complete if self.have_passed(request_id)}

    def forget(self, request_ids: Iterable[str]) -> None:
        """These pulls have ended, well or not."""
        for request_id in request_ids:
            self._before_s.pop(request_id, None)
