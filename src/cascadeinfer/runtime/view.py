"""The operators' view of the runtime: each instance's state, as gauges and as the JSON of `/admin/instances`."""

import asyncio
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.kind import InstanceKind, InstanceTerms, Role
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.links import Link
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.protocol import Engine, EngineCounters
from cascadeinfer.runtime.gauges import InstanceGauges
from cascadeinfer.runtime.instance_state import PHASES, SILENT, Deed, Happening, InstanceLife
from cascadeinfer.runtime.pairs import BrokenPair
from cascadeinfer.runtime.streams import StreamTable
from cascadeinfer.runtime.supervise import Supervisor

IDLE = InstanceReport((), (), (), (), 0)
MAX_LISTED_REQUESTS = 1000
"""Live requests that the snapshot lists one by one, the oldest first: about 100 KB of JSON."""

MAX_LISTED_DEATHS = 5
"""Number of an instance's latest deaths that the snapshot lists."""


@dataclass(slots=True)
class Drain:
    """
    The drain of an instance.

    Attributes:
        began_s: When it began.
        ends_s: When its time is up.
        n_requests: Requests on the instance when it began.
        news: Set when the instance may be empty.
    """

    began_s: float
    ends_s: float
    n_requests: int
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Departed:
    """
    A removed instance.

    Attributes:
        how: A few words: `drained`, `did not start`, and so on.
        error: What went wrong, or None.
        at_s: When it was removed.
        life: Its history.
    """

    instance_id: InstanceId
    how: str
    error: str | None
    at_s: float
    life: InstanceLife


@dataclass(slots=True)
class InstanceRecord:
    """
    One instance as the runtime knows it.

    Where it is in its life is its supervisor's to say; what is derived from that is a property here.

    Attributes:
        build: What it is started with.
        replaces: The instance whose place among the stages it takes over, or None.
        heir_of: The first in the row of those that replaced one another up to it; None if it replaces none.
        kind: What it was when it last came up; None before.
        settled: Set once it has come up, or failed to, for the first time.
        drain: Of the drain it is in, or was removed by; None before.
    """

    supervisor: Supervisor
    build: Build = FIRST_BUILD
    replaces: InstanceId | None = None
    heir_of: InstanceId | None = None
    capacity: InstanceCapacity | None = None
    kind: InstanceKind | None = None
    report: InstanceReport = IDLE
    counters: EngineCounters = field(default_factory=EngineCounters)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    last_error: str = ""
    drain: Drain | None = None

    @property
    def instance_id(self) -> InstanceId:
        """Its name."""
        return self.supervisor.instance_id

    @property
    def life(self) -> InstanceLife:
        """Where it is in its life."""
        return self.supervisor.life

    @property
    def engine(self) -> Engine | None:
        """Its engine while it is in use, else None."""
        return self.supervisor.engine if self.life.allows(Deed.RUN) else None

    @property
    def suspect(self) -> bool:
        """Whether its report is overdue while it is in use."""
        return self.life.state in SILENT

    async def first_up(self) -> None:
        """Wait until it is up for the first time. Raises EngineError when it has failed to come up."""
        await self.settled.wait()
        if self.engine is None:
            raise EngineError(f"did not come up: {self.last_error}", instance_id=self.instance_id)

    def came_up(
        self,
        engine: Engine,
        capacity: InstanceCapacity,
        role: Role = Role.MIXED,
        started_tokens: int | None = None,
    ) -> InstanceKind:
        """It is ready to take requests; returns what it is."""
        assert engine is self.supervisor.engine
        self.supervisor.happen(Happening.JOINED)
        self.capacity = capacity
        limited = None if started_tokens == capacity.max_batched_tokens else started_tokens
        self.kind = kind = dataclasses.replace(self.build.kind(capacity), role=role, started_tokens=limited)
        self.settled.set()
        return kind

    def changed(self, terms: InstanceTerms) -> InstanceKind:
        """It has another role or token budget; returns what it is now."""
        assert self.kind is not None  # it is up
        self.kind = self.kind.with_terms(terms)
        self.capacity = self.kind.capacity
        return self.kind

    def went_down(self, why: str) -> None:
        """It is out of use: its last report no longer holds."""
        assert self.engine is None
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
            pulled_tokens=self.counters.pulled_tokens,
            precopied_tokens=self.counters.precopied_tokens,
            phase=PHASES[self.life.state],
            kind=self.kind,
            build=self.build.number,
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
    instances: Iterable[InstanceRecord],
    departed: Iterable[Departed],
    layout: StageLayout | None,
    streams: StreamTable,
    n_migrations: int,
    migration_counts: Mapping[str, int],
    now_s: float,
    broken_pairs: Iterable[BrokenPair] = (),
    links: Iterable[Link] = (),
) -> dict[str, Any]:
    """The JSON of `/admin/instances`; the fields are documented in `docs/operating.md`."""
    short = tally(streams, n_migrations, migration_counts)
    on_instance = short["on_instance"]
    return {
        "stages": [
            {"range": str(stage.range), "instances": list(stage.instance_ids)}
            for stage in (layout.stages if layout is not None else ())
        ],
        "instances": [
            snapshot_of(record, layout, on_instance.get(record.instance_id, 0), now_s) for record in instances
        ],
        "departed": [
            {
                "id": gone.instance_id,
                "how": gone.how,
                "error": gone.error,
                "seconds_ago": round(now_s - gone.at_s, 1),
                "history": history_of(gone.life, now_s),
            }
            for gone in departed
        ],
        "broken_pairs": [
            {"instances": list(pair.instance_ids), "error": pair.error, "since_s": round(now_s - pair.since_s, 1)}
            for pair in broken_pairs
        ],
        "links": [{**link._asdict(), "tokens_per_s": round(link.tokens_per_s)} for link in links],
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


def history_of(life: InstanceLife, now_s: float) -> list[dict[str, Any]]:
    """The last passages of a life, the oldest first, for the JSON."""
    return [
        {
            "event": passage.happening.value,
            "state": passage.state.value,
            "seconds_ago": round(now_s - passage.at_s, 1),
            "why": passage.why or None,
        }
        for passage in life.history
    ]


def snapshot_of(record: InstanceRecord, layout: StageLayout | None, n_requests: int, now_s: float) -> dict[str, Any]:
    """One instance of the JSON."""
    drain, supervisor = record.drain, record.supervisor
    deaths = supervisor.back_off.in_window(now_s)
    next_start_s = supervisor.next_start_s
    return {
        "id": record.instance_id,
        "phase": PHASES[record.life.state],
        "state": record.life.state.value,
        "history": history_of(record.life, now_s),
        "stage": record.stage_index(layout),
        "role": None if record.kind is None else record.kind.role.value,
        "build": record.build.number,
        "up": record.engine is not None,
        "suspect": record.suspect,
        "pid": record.engine.pid if record.engine is not None else None,
        "restarts": supervisor.restarts,
        "last_error": record.last_error or None,
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
        "running": record.report.n_running,
        "waiting": record.report.n_waiting,
        "lengths": sorted(record.report.running_tokens + record.report.foreign_running_tokens),
        "kv_usage": round(record.kv_usage(), 4),
        "kv_blocks": record.capacity.kv_blocks if record.capacity is not None else None,
        "kv_blocks_used": record.report.kv_blocks_used,
        "kv_pulls": record.counters.pulls,
        "pulled_tokens": record.counters.pulled_tokens,
        "precopied_tokens": record.counters.precopied_tokens,
        "failed_pulls": record.counters.failed_pulls,
        "pinned": record.counters.pinned,
        "reserved": record.counters.reserved,
        "held_blocks": dict(record.counters.held_blocks),
        "steps": record.counters.steps,
        "step_budget": record.counters.step_budget or None,
    }
