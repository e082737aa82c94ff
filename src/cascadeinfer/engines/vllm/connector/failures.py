"""
A fault in handling one request ends that request, never the engine.

An exception in a hook of the connector would propagate through the scheduler and end the EngineCore with every request
in it. `Failures.at` catches it: the fault is logged with its traceback, the request is left out of further steps and
ends with the finish reason `error` when the next output is processed. The scheduler has a list of requests to end this
way, those whose grammar does not compile; the failed ones are added to it.

What such a request holds is freed with it. One case needs help: a request that the scheduler believes to wait for a
pull that the worker was never told of would wait, although finished, for the end of that pull. It is made to look like
one whose pull has failed, which the scheduler frees.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

logger = logging.getLogger(__name__)


class Failures:
    """The requests that must end with an error."""

    def __init__(self) -> None:
        """Start empty."""
        self._ending: set[str] = set()

    def __contains__(self, request_id: str) -> bool:
        """Whether a request must end with an error."""
        return request_id in self._ending

    @contextmanager
    def at(self, request: Request, hook: str) -> Iterator[None]:
        """Run a hook for a request; a fault is logged and ends the request."""
        try:
            yield
        except Exception:
            logger.exception("request %s ends with an error: %s failed", request.request_id, hook)
            self.end(request)

    def end(self, request: Request) -> None:
        """End a request with an error, unless it has finished."""
        if request.is_finished():
            return
        request.kv_transfer_params = None
        # With it set, the scheduler would not ask the connector and would let the request run.
        request.skip_reading_prefix_cache = False
        self._ending.add(request.request_id)

    def forget(self, request_id: str) -> None:
        """Forget a request that has finished."""
        self._ending.discard(request_id)

    def hand_over(self, scheduler: Scheduler | None) -> None:
        """
        Let the scheduler end them; called at the end of a schedule, once the scheduler is known. They do not run until
        then.
        """
        if not self._ending or scheduler is None:
            return
        for request_id in self._ending:
            request = scheduler.requests.get(request_id)
            if request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                request.num_computed_tokens = 0
                scheduler.failed_recving_kv_req_ids.add(request_id)
                scheduler.finished_recving_kv_req_ids.add(request_id)
        scheduler.grammar_compile_error_reqs.update(self._ending)
