"""
Requests that wait, inside real engine processes, at a length that the test names.

Engines do not wait for a slow test: a request of a hundred tokens may have ended before the test can cut it. One whose
id has a mark of `held_at` takes no step from that length on until it is cut or let go (`GO`).

`hold_requests` wraps vLLM's scheduler before engines are forked. The first mark is of a request's first attempt, and so
on, so that one with several is held on each of several instances.
"""

import re
from typing import Any

GO = "cascade_test_go"
"""The engine's utility that lets a held request go on: `GO(engine_request_id)`."""
MARK = re.compile(r"@(\d+)")
ATTEMPT = re.compile(r"~(\d+)$")


def held_at(request_id: str, *lengths: int) -> str:
    """The id of a request whose attempts are held at these sequence lengths; it begins as the given one."""
    return f"{request_id}-" + "".join(f"@{length}" for length in lengths) if lengths else request_id


def hold_requests() -> None:
    """Wrap the scheduler of engines forked from now on; requests without a mark are left alone."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    schedule = Scheduler.schedule

    def holding(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        for request in self.running:
            if _is_held(self, request):
                request.next_decode_eligible_step = self.current_step + 2  # the scheduler counts this step first
        return schedule(self, *args, **kwargs)

    def let_go(self: EngineCore, request_id: str) -> None:
        _held_at(self.scheduler)[request_id] = None

    Scheduler.schedule = holding
    setattr(EngineCore, GO, let_go)


def _is_held(scheduler: Any, request: Any) -> bool:
    """Whether the request, with what is in flight, is as long as its mark; a cut one goes on to its end."""
    if "@" not in request.request_id:
        return False
    length = request.num_tokens + request.num_output_placeholders
    held_at = _held_at(scheduler)
    if request.request_id not in held_at:
        mark = _mark_of(request.request_id)
        held_at[request.request_id] = mark if mark is not None and length < mark else None
    mark = held_at[request.request_id]
    if mark is None or length < mark:
        return False
    return request.request_id not in scheduler.connector.connector_scheduler._cuts._pending


def _mark_of(engine_request_id: str) -> int | None:
    """The mark of this attempt, if there is one."""
    attempt = ATTEMPT.search(engine_request_id)
    number = 0 if attempt is None else int(attempt[1])
    marks = MARK.findall(engine_request_id)
    return int(marks[number]) if number < len(marks) else None


def _held_at(scheduler: Any) -> dict[str, int | None]:
    """The length at which each marked request of this engine waits, None for those that do not."""
    if not hasattr(scheduler, "cascade_test_held_at"):
        scheduler.cascade_test_held_at = {}
    held_at: dict[str, int | None] = scheduler.cascade_test_held_at
    return held_at
