"""What followers add to process 0's view of the whole, for snapshots and pictures."""

from collections.abc import Iterable
from typing import Any

from cascadeinfer.frontend.processes.messages import Summary
from cascadeinfer.runtime.picture import MAX_OLDEST, OldRequest


def add_load(everything: dict[str, Any], summary: Summary) -> None:
    """Add a follower's requests to a snapshot or a picture."""
    everything["requests"]["live"] += summary.live
    everything["requests"]["unplaced"] += summary.unplaced
    for instance in everything["instances"]:
        instance["requests"] += summary.on_instance.get(instance["id"], 0)


def add_migrations(snapshot: dict[str, Any], summary: Summary) -> None:
    """Add a follower's moves to a snapshot."""
    snapshot["migrations"]["under_way"] += summary.migrations_under_way
    ended = snapshot["migrations"]["ended"]
    for outcome, n in summary.migrations_ended.items():
        ended[outcome] = ended.get(outcome, 0) + n


def add_oldest(picture: dict[str, Any], own: Iterable[OldRequest], summaries: Iterable[Summary], now_s: float) -> None:
    """List the oldest requests of all processes in a picture: process 0's own and the followers'."""
    everyones = [*own, *(request for summary in summaries for request in summary.oldest)]
    everyones.sort(key=lambda request: (request.arrived_s, request.request_id))
    picture["requests"]["oldest"] = [request.shown(now_s) for request in everyones[:MAX_OLDEST]]


def shown(index: int, pid: int | None, restarts: int, summary: Summary | None) -> dict[str, Any]:
    """A process in the JSON of `/admin/instances`."""
    return {
        "process": index,
        "pid": pid,
        "up": summary is not None,
        "restarts": restarts,
        "requests": 0 if summary is None else summary.live,
        "migrations_under_way": 0 if summary is None else summary.migrations_under_way,
        "event_log_failure": None if summary is None else summary.event_log_failure,
    }
