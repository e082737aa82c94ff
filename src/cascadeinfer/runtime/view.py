"""What operators see of the runtime: the state of each instance, as gauges and as the JSON of `/admin/instances`."""

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.protocol import Engine, EngineCounters
from cascadeinfer.runtime.metrics import InstanceGauges
from cascadeinfer.runtime.pairs import BrokenPair
from cascadeinfer.runtime.streams import StreamTable
from cascadeinfer.runtime.supervise import Supervisor

IDLE = InstanceReport((), (), (), (), 0)
MAX_LISTED_REQUESTS = 1000
"""Live requests that the snapshot lists one by one, the oldest first: about 100 KB of JSON."""

MAX_LISTED_DEATHS = 5
"""Of one instance: its last ones."""


@dataclass(slots=True)
class Drain:
    """
    An instance is being emptied.

    Attributes:
        began_s: When it began.
        ends_s: When its time is up.
        n_requests: Requests that were there when it began.
        news: Set when it may be empty.
    """

    began_s: float
    ends_s: float
    n_requests: int
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Departed:
    """
    What became of an instance that is gone for good.

    Attributes:
        how: In a few words: `drained`, `did not start`, and so on.
        error: What went wrong on the way, or None.
        at_s: When.
    """

    instance_id: InstanceId
    how: str
    error: str | None
    at_s: float


@dataclass(slots=True)
class InstanceState:
    """
    One instance as the runtime knows it.

    Attributes:
        engine: Its engine while it is up, else None.
        settled: Set once it has come up, or failed to, for the first time.
        drain: Set while it is being emptied or removed.
        suspect: Whether its report is overdue.
    """

    supervisor: Supervisor
    engine: Engine | None = None
    capacity: InstanceCapacity | None = None
    report: InstanceReport = IDLE
    counters: EngineCounters = field(default_factory=EngineCounters)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    last_error: str = ""
    drain: Drain | None = None
    suspect: bool = False

    @property
    def instance_id(self) -> InstanceId:
        """Its name."""
        return self.supervisor.instance_id

    @property
    def phase(self) -> str:
        """Where it is in its life: `starting`, `up`, `down` (being restarted) or `draining`."""
        if self.drain is not None:
            return "draining"
        if self.engine is not None:
            return "up"
        return "down" if self.settled.is_set() else "starting"

    async def first_up(self) -> None:
        """Wait until it is up for the first time. Raises EngineError when it has failed to come up."""
        await self.settled.wait()
        if self.engine is None:
            raise EngineError(f"did not come up: {self.last_error}", instance_id=self.instance_id)

    def came_up(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """It is ready to take requests."""
        self.engine = engine
        self.suspect = False
        self.capacity = capacity
        self.settled.set()

    def went_down(self, why: str) -> None:
        """It is gone: what it reported holds no more."""
        self.engine = None
        self.suspect = False
        self.last_error = why
        self.report = IDLE
        self.counters = EngineCounters()
        self.settled.set()

    def stage_index(self, layout: StageLayout | None) -> int | None:
        """Its stage's number."""
        return None if layout is None else layout.stage_index_of_instance(self.instance_id)

    def kv_usage(self) -> float:
        """Share of its KV blocks in use."""
        return 0.0 if self.capacity is None else self.report.kv_blocks_used / self.capacity.kv_blocks

    def gauges(self, layout: StageLayout | None, n_broken_pairs: int = 0) -> InstanceGauges:
        """Its gauges for Prometheus."""
        stage = self.stage_index(layout)
        return InstanceGauges(
            instance_id=self.instance_id,
            stage="" if stage is None else str(stage),
            up=self.engine is not None,
            suspect=self.suspect,
            running=self.report.n_running,
            waiting=self.report.n_waiting,
            kv_usage=self.kv_usage(),
            kv_pulls=self.counters.pulls,
            failed_pulls=self.counters.failed_pulls,
            pinned=self.counters.pinned,
            held_blocks=self.counters.held_blocks,
            restarts=self.supervisor.restarts,
            broken_pairs=n_broken_pairs,
        )


def tally(streams: StreamTable, n_migrations: int, migration_counts: Mapping[str, int]) -> dict[str, Any]:
    """How many requests there are and where, in short."""
    on_instance: dict[InstanceId | None, int] = {}
    for stream in streams:
        on_instance[stream.instance_id] = on_instance.get(stream.instance_id, 0) + 1
    unplaced = on_instance.pop(None, 0)
    return {
        "live": len(streams),
        "unplaced": unplaced,
        "on_instance": on_instance,
        "migrations_under_way": n_migrations,
        "migrations_ended": dict(sorted(migration_counts.items())),
    }


def snapshot(
    instances: Iterable[InstanceState],
    departed: Iterable[Departed],
    layout: StageLayout | None,
    streams: StreamTable,
    n_migrations: int,
    migration_counts: Mapping[str, int],
    now_s: float,
    broken_pairs: Iterable[BrokenPair] = (),
) -> dict[str, Any]:
    """The JSON of `/admin/instances`; the fields are documented in `docs/operating.md`."""
    short = tally(streams, n_migrations, migration_counts)
    on_instance = short["on_instance"]
    return {
        "stages": [
            {"range": str(stage.range), "instances": list(stage.instance_ids)}
            for stage in (layout.stages if layout is not None else ())
        ],
        "instances": [snapshot_of(state, layout, on_instance.get(state.instance_id, 0), now_s) for state in instances],
        "departed": [
            {"id": gone.instance_id, "how": gone.how, "error": gone.error, "seconds_ago": round(now_s - gone.at_s, 1)}
            for gone in departed
        ],
        "broken_pairs": [
            {"instances": list(pair.instance_ids), "error": pair.error, "since_s": round(now_s - pair.since_s, 1)}
            for pair in broken_pairs
        ],
        "requests": {
            "live": short["live"],
            "unplaced": short["unplaced"],
            "oldest": [
                {
                    "id": stream.request.request_id,
                    "instance": stream.instance_id,
                    "tokens": stream.n_tokens,
                    "attempts": stream.attempts,
                    "pinned": stream.request.pin_reason,
                }
                for stream in itertools.islice(streams, MAX_LISTED_REQUESTS)
            ],
        },
        "migrations": {"under_way": n_migrations, "ended": short["migrations_ended"]},
    }


def snapshot_of(state: InstanceState, layout: StageLayout | None, n_requests: int, now_s: float) -> dict[str, Any]:
    """One instance of the JSON."""
    drain, supervisor = state.drain, state.supervisor
    deaths = supervisor.back_off.in_window(now_s)
    next_start_s = supervisor.next_start_s
    return {
        "id": state.instance_id,
        "phase": state.phase,
        "stage": state.stage_index(layout),
        "up": state.engine is not None,
        "suspect": state.suspect,
        "pid": state.engine.pid if state.engine is not None else None,
        "restarts": supervisor.restarts,
        "last_error": state.last_error or None,
        "deaths": [
            {"seconds_ago": round(now_s - death.at_s, 1), "error": death.why} for death in deaths[-MAX_LISTED_DEATHS:]
        ],
        "deaths_in_window": len(deaths),
        "restart_in_s": None if next_start_s is None else round(max(0.0, next_start_s - now_s), 1),
        "drain": drain
        and {
            "since_s": round(now_s - drain.began_s, 1),
            "time_left_s": round(max(0.0, drain.ends_s - now_s), 1),
            "requests_at_start": drain.n_requests,
        },
        "requests": n_requests,
        "running": state.report.n_running,
        "waiting": state.report.n_waiting,
        "lengths": sorted(state.report.running_tokens + state.report.foreign_running_tokens),
        "kv_usage": round(state.kv_usage(), 4),
        "kv_blocks": state.capacity.kv_blocks if state.capacity is not None else None,
        "kv_blocks_used": state.report.kv_blocks_used,
        "kv_pulls": state.counters.pulls,
        "pulled_tokens": state.counters.pulled_tokens,
        "failed_pulls": state.counters.failed_pulls,
        "pinned": state.counters.pinned,
        "reserved": state.counters.reserved,
        "held_blocks": dict(state.counters.held_blocks),
    }
