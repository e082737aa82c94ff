"""
One moment of the whole server as JSON: what the operator's page and `cascadeinfer top` draw.

A pure function of a `Scene`. It costs time in proportion to the instances and live requests, so it runs only while
somebody watches, once for all who do (`frontend/page/viewers.py`). `/admin/instances` is for scripts and keeps its
form; this is for our own page, and may change with it.

    now_s, uptime_s
    stages[]         lo, hi (null: no end), instances
    plan             null without stages, else why, since_s (ago), failure, next (null, or due_s, requests,
                     needed_requests, needed_gain, last)
    instances[]      see `_instance`
    moves            under_way[]: id, request, source, target, tokens, reason
                     recent[]: the same, and outcome, detail, pause_s, seconds_ago; of the last RECENT_S seconds
                     ended[]: outcome, reason, count, details {detail: count}, pause_s (null, or n, p50, p95, p99)
    requests         live, unplaced, ended {outcome: count}, oldest[]: id, instance, tokens, prompt_tokens, age_s,
                     attempts, pinned, moving
    departed[]       id, how, error, seconds_ago
    broken_pairs[]   instances, error, since_s
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cascadeinfer.core.kind import DEFAULT_STEP_MODEL
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policy import NextPlan
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, MigrationId, RequestId
from cascadeinfer.runtime.fleet import LayoutNote
from cascadeinfer.runtime.instance_state import PHASES
from cascadeinfer.runtime.ledger import EndedMove, Ledger, MoveTally
from cascadeinfer.runtime.pairs import BrokenPair
from cascadeinfer.runtime.streams import Stream, StreamTable
from cascadeinfer.runtime.view import Departed, InstanceRecord

MAX_OLDEST: Final = 12
RECENT_S: Final = 3.0
"""A watcher that misses a picture or two still sees every move."""
PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Move:
    """
    A migration under way.

    Attributes:
        n_tokens: The request's current length.
    """

    migration_id: MigrationId
    request_id: RequestId
    source_id: InstanceId
    target_id: InstanceId
    n_tokens: int
    reason: str

    def shown(self) -> dict[str, Any]:
        """For the JSON."""
        return _move(self)


@dataclass(frozen=True, slots=True)
class OldRequest:
    """
    One of the oldest live requests of a process.

    Attributes:
        n_tokens: Its current length.
        arrived_s: When it came, on the clock that all processes of a machine share.
        pin_reason: Why it may not move; None if it may.
    """

    request_id: RequestId
    instance_id: InstanceId | None
    n_tokens: int
    prompt_tokens: int
    arrived_s: float
    attempts: int
    pin_reason: str | None
    moving: bool

    def shown(self, now_s: float) -> dict[str, Any]:
        """For the JSON."""
        return {
            "id": self.request_id,
            "instance": self.instance_id,
            "tokens": self.n_tokens,
            "prompt_tokens": self.prompt_tokens,
            "age_s": round(now_s - self.arrived_s, 1),
            "attempts": self.attempts,
            "pinned": self.pin_reason,
            "moving": self.moving,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """
    What a picture is made of.

    Attributes:
        now_s, began_s: Now, and when the runtime was made, on the runtime's clock.
        layout, layout_note: The stages in force, and why; None before any are.
        next_plan: None if the policy makes no plans.
        moves: Migrations under way.
    """

    now_s: float
    began_s: float
    instances: Sequence[InstanceRecord]
    departed: Sequence[Departed]
    layout: StageLayout | None
    layout_note: LayoutNote | None
    next_plan: NextPlan | None
    streams: StreamTable
    moves: Sequence[Move]
    ledger: Ledger
    broken_pairs: Sequence[BrokenPair]


def picture_of(scene: Scene) -> dict[str, Any]:
    """The JSON in the module header."""
    now_s = scene.now_s
    placed = Counter(stream.instance_id for stream in scene.streams)
    stage_of = {i: n for n, stage in enumerate(scene.layout.stages if scene.layout else ()) for i in stage.instance_ids}
    moves = scene.ledger.moves.items()
    return {
        "now_s": round(now_s, 3),
        "uptime_s": round(now_s - scene.began_s, 1),
        "stages": _stages(scene.layout),
        "plan": _plan(scene),
        "instances": [
            _instance(record, stage_of.get(record.instance_id), placed[record.instance_id], now_s)
            for record in scene.instances
        ],
        "moves": {
            "under_way": [move.shown() for move in scene.moves],
            "recent": [_recent(move, now_s) for move in scene.ledger.recent if now_s - move.at_s <= RECENT_S],
            "ended": [_ended(outcome.value, reason.value, tally) for (outcome, reason), tally in sorted(moves)],
        },
        "requests": {
            "live": len(scene.streams),
            "unplaced": placed[None],
            "ended": dict(sorted(scene.ledger.requests.items())),
            "oldest": [request.shown(now_s) for request in oldest_of(scene.streams)],
        },
        "departed": [
            {"id": gone.instance_id, "how": gone.how, "error": gone.error, "seconds_ago": round(now_s - gone.at_s, 1)}
            for gone in scene.departed
        ],
        "broken_pairs": [
            {"instances": list(pair.instance_ids), "error": pair.error, "since_s": round(now_s - pair.since_s, 1)}
            for pair in scene.broken_pairs
        ],
    }


def _stages(layout: StageLayout | None) -> list[dict[str, Any]]:
    return [
        {
            "lo": stage.range.lo_tokens,
            "hi": None if stage.range.hi_tokens >= UNBOUNDED_TOKENS else stage.range.hi_tokens,
            "instances": list(stage.instance_ids),
        }
        for stage in (layout.stages if layout is not None else ())
    ]


def _plan(scene: Scene) -> dict[str, Any] | None:
    note, coming = scene.layout_note, scene.next_plan
    if note is None:
        return None
    return {
        "why": note.why or None,
        "since_s": round(scene.now_s - note.since_s, 1),
        "failure": note.failure or None,
        "next": coming
        and {
            "due_s": None if coming.due_s is None else round(max(0.0, coming.due_s - scene.now_s), 1),
            "requests": round(coming.requests, 1),
            "needed_requests": coming.needed_requests,
            "needed_gain": round(coming.needed_gain, 4),
            "last": coming.last or None,
        },
    }


def _instance(record: InstanceRecord, stage: int | None, n_requests: int, now_s: float) -> dict[str, Any]:
    """
    One lane: `role` is null before its first start, `step_model` if it is the usual one; `lengths` are those of running
    requests in tokens, ascending; the rest is as in `/admin/instances`.
    """
    supervisor, drain, report, counters = record.supervisor, record.drain, record.report, record.counters
    next_start_s, kind = supervisor.next_start_s, record.kind
    return {
        "id": record.instance_id,
        "stage": stage,
        "role": None if kind is None else kind.role.value,
        "step_model": kind.step_model_key if kind is not None and kind.step_model_key != DEFAULT_STEP_MODEL else None,
        "phase": PHASES[record.life.state],
        "state": record.life.state.value,
        "build": record.build.number,
        "up": record.engine is not None,
        "suspect": record.suspect,
        "restarts": supervisor.restarts,
        "last_error": record.last_error or None,
        "restart_in_s": None if next_start_s is None else round(max(0.0, next_start_s - now_s), 1),
        "drain": drain
        and {"time_left_s": round(max(0.0, drain.ends_s - now_s), 1), "requests_at_start": drain.n_requests},
        "requests": n_requests,
        "running": report.n_running,
        "waiting": report.n_waiting,
        "lengths": sorted(report.running_tokens + report.foreign_running_tokens),
        "kv_usage": round(record.kv_usage(), 4),
        "kv_blocks": record.capacity.kv_blocks if record.capacity is not None else None,
        "pinned": counters.pinned,
        "reserved": counters.reserved,
        "failed_pulls": counters.failed_pulls,
        "held_blocks": {reason: n for reason, n in counters.held_blocks.items() if n},
    }


def _move(move: Move | EndedMove) -> dict[str, Any]:
    return {
        "id": move.migration_id,
        "request": move.request_id,
        "source": move.source_id,
        "target": move.target_id,
        "tokens": move.n_tokens,
        "reason": move.reason,
    }


def _recent(move: EndedMove, now_s: float) -> dict[str, Any]:
    return {
        **_move(move),
        "outcome": move.outcome,
        "detail": move.detail,
        "pause_s": None if move.pause_s is None else round(move.pause_s, 4),
        "seconds_ago": round(now_s - move.at_s, 2),
    }


def _ended(outcome: str, reason: str, tally: MoveTally) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "reason": reason,
        "count": tally.count,
        "details": dict(tally.details.most_common()),
        "pause_s": _percentiles(tally.pauses_s),
    }


def _percentiles(pauses_s: Iterable[float]) -> dict[str, Any] | None:
    values = np.fromiter(pauses_s, dtype=float)
    if not len(values):
        return None
    found = (round(float(value), 4) for value in np.percentile(values, PERCENTILES))
    return {"n": len(values), **{f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}}


def oldest_of(streams: StreamTable) -> list[OldRequest]:
    """The oldest live requests of this process, at most `MAX_OLDEST`, the oldest first."""
    return [_old(stream) for stream in itertools.islice(streams, MAX_OLDEST)]


def _old(stream: Stream) -> OldRequest:
    request = stream.request
    return OldRequest(
        request.request_id,
        stream.instance_id,
        stream.n_tokens,
        len(request.prompt_token_ids),
        stream.arrived_s,
        stream.attempts,
        request.pin_reason,
        stream.migration is not None,
    )
