"""
A policy's books: which instances there are, which requests are where, how loaded each is.

One writer: `ClusterView.apply(event)`. Policies read the rest. Between two reports an instance's load is corrected by what was
dispatched to it, moved and finished since, so that a burst of arrivals does not all land on the instance that was idle at the
last report. Dicts keep insertion order and ids are sorted where order matters: no decision depends on hashing.
"""

from dataclasses import dataclass, field

from cascadeinfer.core.effects import Dispatch, Effect, StartMigration
from cascadeinfer.core.events import (
    Event,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReported,
    MessageReceived,
    MigrationEnded,
    MigrationOutcome,
    PinReason,
    RequestArrived,
    RequestFinished,
    TimerFired,
)
from cascadeinfer.core.types import InstanceCapacity, InstanceId, MigrationId, RequestId


@dataclass(slots=True)
class RequestView:
    """
    What a policy knows of one request.

    Attributes:
        tokens: Sequence length at the last report (prompt + output so far).
        instance_id: Where it runs or waits; None while it waits for its dispatch.
        migration_id: The migration it takes part in, or None.

    """

    request_id: RequestId
    prompt_tokens: int
    max_output_tokens: int
    tokens: int
    pin_reason: PinReason | None = None
    prefix_hashes: tuple[int, ...] = ()
    priority: int = 0
    instance_id: InstanceId | None = None
    migration_id: MigrationId | None = None


@dataclass(slots=True)
class InstanceView:
    """
    What a policy knows of one instance.

    Attributes:
        request_ids: Requests placed here, waiting or running, in order of placement (a dict used as an ordered set).
        kv_tokens: Sum of their lengths; kept up to date between reports.
        waiting: Requests that waited at the last report or were placed since, so have not been seen running.
        inbound: Requests on their way here by migration, with their lengths in tokens.
        outbound: Migrations that leave here.

    """

    instance_id: InstanceId
    capacity: InstanceCapacity
    draining: bool = False
    request_ids: dict[RequestId, None] = field(default_factory=dict)
    kv_tokens: int = 0
    waiting: dict[RequestId, None] = field(default_factory=dict)
    inbound: dict[MigrationId, int] = field(default_factory=dict)
    outbound: dict[MigrationId, None] = field(default_factory=dict)
    kv_blocks_used: int = 0
    step_s: float = 0.0

    @property
    def migrations(self) -> int:
        """Migrations this instance takes part in, either way."""
        return len(self.inbound) + len(self.outbound)

    @property
    def committed_kv_tokens(self) -> int:
        """Tokens here or on their way here."""
        return self.kv_tokens + sum(self.inbound.values())

    @property
    def committed_requests(self) -> int:
        """Requests here or on their way here."""
        return len(self.request_ids) + len(self.inbound)

    def free_blocks(self) -> int:
        """Blocks that nothing here or on its way here will need as it is; negative when overcommitted."""
        needed = self.capacity.blocks_for(self.committed_kv_tokens) + self.committed_requests // 2
        return self.capacity.kv_blocks - max(needed, self.kv_blocks_used)


class ClusterView:
    """The cluster as a policy sees it. See the module header."""

    def __init__(self) -> None:
        """Start with no instance and no request."""
        self.instances: dict[InstanceId, InstanceView] = {}
        self.requests: dict[RequestId, RequestView] = {}

    def available(self) -> list[InstanceView]:
        """Instances that take new requests, sorted by id."""
        return [i for _, i in sorted(self.instances.items()) if not i.draining]

    def unplaced(self) -> list[RequestView]:
        """Requests that wait for a dispatch, in order of arrival."""
        return [r for r in self.requests.values() if r.instance_id is None]

    def apply(self, event: Event) -> None:
        """Follow one event. Unknown ids are ignored: a report can cross a finish."""
        match event:
            case RequestArrived():
                self.requests[event.request_id] = RequestView(
                    event.request_id,
                    event.prompt_tokens,
                    event.max_output_tokens,
                    event.prompt_tokens,
                    event.pin_reason,
                    event.prefix_hashes,
                    event.priority,
                )
            case RequestFinished():
                self._remove(event.request_id)
            case InstanceReported():
                self._report(event)
            case InstanceJoined():
                self.instances[event.instance_id] = InstanceView(event.instance_id, event.capacity)
            case InstanceDraining():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance.draining = True
            case InstanceLost():
                self._lose(event)
            case MigrationEnded():
                self._end_migration(event)
            case MessageReceived() | TimerFired():
                return

    def carry_out(self, effects: list[Effect]) -> None:
        """Note what the policy itself has just decided, so that its next decision knows."""
        for effect in effects:
            if isinstance(effect, Dispatch):
                self._place(effect.request_id, effect.instance_id)
            elif isinstance(effect, StartMigration):
                self._start_migration(effect)

    def _place(self, request_id: RequestId, instance_id: InstanceId) -> None:
        request = self.requests.get(request_id)
        instance = self.instances.get(instance_id)
        if request is None or instance is None:
            return
        request.instance_id = instance_id
        instance.request_ids[request_id] = None
        instance.waiting[request_id] = None
        instance.kv_tokens += request.tokens

    def _take_away(self, request: RequestView) -> None:
        instance = self.instances.get(request.instance_id) if request.instance_id is not None else None
        if instance is not None and request.request_id in instance.request_ids:
            del instance.request_ids[request.request_id]
            instance.waiting.pop(request.request_id, None)
            instance.kv_tokens -= request.tokens
        request.instance_id = None

    def _remove(self, request_id: RequestId) -> None:
        request = self.requests.pop(request_id, None)
        if request is not None:
            self._take_away(request)

    def _report(self, event: InstanceReported) -> None:
        instance = self.instances.get(event.instance_id)
        if instance is None:
            return
        report = event.report
        for ids, lengths, waits in (
            (report.running_ids, report.running_tokens, False),
            (report.waiting_ids, report.waiting_tokens, True),
        ):
            for request_id, tokens in zip(ids, lengths, strict=True):
                if request_id not in instance.request_ids:
                    continue
                request = self.requests[request_id]
                if tokens > request.tokens:
                    instance.kv_tokens += tokens - request.tokens
                    request.tokens = tokens
                if waits:
                    instance.waiting[request_id] = None
                else:
                    instance.waiting.pop(request_id, None)
        instance.kv_blocks_used = report.kv_blocks_used
        if report.step_s > 0.0:
            instance.step_s = report.step_s

    def _lose(self, event: InstanceLost) -> None:
        instance = self.instances.pop(event.instance_id, None)
        tokens_of = dict(zip(event.orphan_ids, event.orphan_tokens, strict=True))
        placed_here = list(instance.request_ids) if instance is not None else []
        for request_id in {**dict.fromkeys(placed_here), **dict.fromkeys(event.orphan_ids)}:
            request = self.requests.get(request_id)
            if request is None:
                continue
            self._take_away(request)  # an orphan may still count elsewhere: at the source of a migration that was lost
            request.tokens = max(request.tokens, tokens_of.get(request_id, 0))

    def _start_migration(self, effect: StartMigration) -> None:
        request = self.requests.get(effect.request_id)
        source = self.instances.get(effect.source_id)
        target = self.instances.get(effect.target_id)
        if request is not None:
            request.migration_id = effect.migration_id
        if source is not None:
            source.outbound[effect.migration_id] = None
        if target is not None and request is not None:
            target.inbound[effect.migration_id] = request.tokens

    def _end_migration(self, event: MigrationEnded) -> None:
        if (source := self.instances.get(event.source_id)) is not None:
            source.outbound.pop(event.migration_id, None)
        if (target := self.instances.get(event.target_id)) is not None:
            target.inbound.pop(event.migration_id, None)
        request = self.requests.get(event.request_id)
        if request is None or request.migration_id != event.migration_id:
            return
        request.migration_id = None
        if event.outcome in (MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED):
            self._take_away(request)
            self._place(event.request_id, event.target_id)
            if target is not None:
                target.waiting.pop(event.request_id, None)
        elif event.outcome is MigrationOutcome.LOST:
            self._take_away(request)
