"""What operators see of the runtime: the state of each instance, as gauges and as the JSON of `/admin/instances`."""

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.plan.layout import StageLayout
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.engines.protocol import Engine, EngineCounters
from cascadeinfer.runtime.metrics import InstanceGauges
from cascadeinfer.runtime.streams import StreamTable
from cascadeinfer.runtime.supervise import Supervisor

IDLE = InstanceReport((), (), (), (), 0)
MAX_LISTED_REQUESTS = 1000
"""Live requests that the snapshot lists one by one, the oldest first: about 100 KB of JSON."""


@dataclass(slots=True)
class InstanceState:
    """
    One instance as the runtime knows it.

    Attributes:
        engine: Its engine while it is up, else None.
        settled: Set once it has come up, or failed to, for the first time.
    """

    supervisor: Supervisor
    engine: Engine | None = None
    capacity: InstanceCapacity | None = None
    report: InstanceReport = IDLE
    counters: EngineCounters = field(default_factory=EngineCounters)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    last_error: str = ""

    @property
    def instance_id(self) -> InstanceId:
        """Its name."""
        return self.supervisor.instance_id

    async def first_up(self) -> None:
        """Wait until it is up for the first time. Raises EngineError when it has failed to come up."""
        await self.settled.wait()
        if self.engine is None:
            raise EngineError(f"did not come up: {self.last_error}", instance_id=self.instance_id)

    def came_up(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """It is ready to take requests."""
        self.engine = engine
        self.capacity = capacity
        self.settled.set()

    def went_down(self, why: str) -> None:
        """It is gone: what it reported holds no more."""
        self.engine = None
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

    def gauges(self, layout: StageLayout | None) -> InstanceGauges:
        """Its gauges for Prometheus."""
        stage = self.stage_index(layout)
        return InstanceGauges(
            instance_id=self.instance_id,
            stage="" if stage is None else str(stage),
            up=self.engine is not None,
            running=len(self.report.running_ids),
            waiting=len(self.report.waiting_ids),
            kv_usage=self.kv_usage(),
            kv_pulls=self.counters.pulls,
            failed_pulls=self.counters.failed_pulls,
            pinned=self.counters.pinned,
            restarts=self.supervisor.restarts,
        )


def snapshot(
    instances: Iterable[InstanceState],
    layout: StageLayout | None,
    streams: StreamTable,
    n_migrations: int,
    migration_counts: Mapping[str, int],
) -> dict[str, Any]:
    """The JSON of `/admin/instances`; the fields are documented in `docs/operating.md`."""
    on_instance: dict[InstanceId | None, int] = {}
    for stream in streams:
        on_instance[stream.instance_id] = on_instance.get(stream.instance_id, 0) + 1
    return {
        "stages": [
            {"range": str(stage.range), "instances": list(stage.instance_ids)}
            for stage in (layout.stages if layout is not None else ())
        ],
        "instances": [
            {
                "id": state.instance_id,
                "stage": state.stage_index(layout),
                "up": state.engine is not None,
                "pid": state.engine.pid if state.engine is not None else None,
                "restarts": state.supervisor.restarts,
                "last_error": state.last_error or None,
                "requests": on_instance.get(state.instance_id, 0),
                "running": len(state.report.running_ids),
                "waiting": len(state.report.waiting_ids),
                "lengths": sorted(state.report.running_tokens),
                "kv_usage": round(state.kv_usage(), 4),
                "kv_blocks": state.capacity.kv_blocks if state.capacity is not None else None,
                "kv_blocks_used": state.report.kv_blocks_used,
                "kv_pulls": state.counters.pulls,
                "pulled_tokens": state.counters.pulled_tokens,
                "failed_pulls": state.counters.failed_pulls,
                "pinned": state.counters.pinned,
                "reserved": state.counters.reserved,
            }
            for state in instances
        ],
        "requests": {
            "live": len(streams),
            "unplaced": on_instance.get(None, 0),
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
        "migrations": {"under_way": n_migrations, "ended": dict(sorted(migration_counts.items()))},
    }
