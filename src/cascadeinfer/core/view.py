"""
A policy's books: which instances there are, which requests are where, how loaded each is.

One writer: `ClusterView.apply(event)` (and `carry_out` for the policy's own decisions). Policies read the rest. Between two reports
an instance's load is corrected by what was dispatched to it, moved and finished since, so that a burst of arrivals does not all
land on the instance that was idle at the last report. Dicts keep insertion order and ids are sorted where order matters: no decision
depends on hashing.

Everything that is read per decision is kept up to date, not computed when asked: an event costs O(1), a report O(requests there) in
C loops (`dict.update`, `sum`), and looking at the load of an instance one attribute. Lengths live with the instance (`request_ids`),
because a report brings them all at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from cascadeinfer.core.effects import Dispatch, Effect, Reject, StartMigration
from cascadeinfer.core.events import (
    Event,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReport,
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


@dataclass(frozen=True, slots=True)
class Pricing:
    """
    What a step of an instance costs its requests: `price = (requests + 1) * (base + per_request * requests + per_token * tokens +
    per_queued_token * queued)`, the seconds that all requests there and one more wait for one token.

    Units are those of `base`. The queue counts because prompts that wait will be computed before or beside the next tokens.

    Attributes:
        base: A step with nothing in it.
        per_request: Each request.
        per_token: Each token of their lengths.
        per_queued_token: Each token of requests that wait, spread over the tokens that a newcomer will produce.
    """

    base: float = 1.0
    per_request: float = 0.0
    per_token: float = 0.0
    per_queued_token: float = 0.0


@dataclass(slots=True, eq=False)
class InstanceView:
    """
    What a policy knows of one instance.

    Attributes:
        request_ids: Requests placed here, waiting or running, with their lengths in tokens at the last report, in order of placement.
        kv_tokens: Sum of their lengths.
        waiting: Requests that waited at the last report or were placed since, so have not been seen running.
        inbound: Requests on their way here by migration, with their lengths in tokens.
        inbound_tokens: Sum of those.
        outbound: Migrations that leave here.
        blocks_committed: Blocks in use at the last report, and what waits here, came since or is on its way here will need; less
            what has left since.
        step_s: Mean step time at the last report that had one, 0.0 before.
        queued_tokens: Sum of the lengths of `waiting`.
        load: The larger of its KV share and its batch share, with everything here and on its way here; 1.0 is full.
        price: See `Pricing`.
    """

    instance_id: InstanceId
    capacity: InstanceCapacity
    pricing: Pricing = Pricing()
    draining: bool = False
    request_ids: dict[RequestId, int] = field(default_factory=dict)
    kv_tokens: int = 0
    waiting: dict[RequestId, None] = field(default_factory=dict)
    inbound: dict[MigrationId, int] = field(default_factory=dict)
    inbound_tokens: int = 0
    outbound: dict[MigrationId, None] = field(default_factory=dict)
    blocks_committed: int = 0
    step_s: float = 0.0
    queued_tokens: int = 0
    load: float = 0.0
    price: float = 0.0
    _per_token: float = field(init=False, repr=False)
    _per_request: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare what `load` is computed from."""
        self._per_token = 1.0 / self.capacity.kv_tokens
        self._per_request = 1.0 / self.capacity.max_num_seqs
        self._weigh()

    @property
    def migrations(self) -> int:
        """Migrations this instance takes part in, either way."""
        return len(self.inbound) + len(self.outbound)

    @property
    def committed_kv_tokens(self) -> int:
        """Tokens here or on their way here."""
        return self.kv_tokens + self.inbound_tokens

    @property
    def committed_requests(self) -> int:
        """Requests here or on their way here."""
        return len(self.request_ids) + len(self.inbound)

    def price_with(self, more_requests: int, more_tokens: int) -> float:
        """The price with so much more on its way here."""
        pricing = self.pricing
        requests = self.committed_requests + more_requests
        step = (
            pricing.base + pricing.per_request * requests + pricing.per_token * (self.committed_kv_tokens + more_tokens)
        )
        return (requests + 1) * (step + pricing.per_queued_token * self.queued_tokens)

    def free_blocks(self) -> int:
        """Blocks that nothing here or on its way here will need as it is; negative when overcommitted."""
        return self.capacity.kv_blocks - self.blocks_committed

    def _weigh(self) -> None:
        """Bring `load` and `price` up to date; called after every change."""
        by_tokens = (self.kv_tokens + self.inbound_tokens) * self._per_token
        by_requests = (len(self.request_ids) + len(self.inbound)) * self._per_request
        self.load = max(by_requests, by_tokens)
        self.price = self.price_with(0, 0)

    def _add(self, request_id: RequestId, tokens: int, *, waits: bool) -> None:
        self.request_ids[request_id] = tokens
        if waits:
            self.waiting[request_id] = None
            self.queued_tokens += tokens
        self.kv_tokens += tokens
        self.blocks_committed += self.capacity.blocks_for(tokens)
        self._weigh()

    def _drop(self, request_id: RequestId) -> int:
        tokens = self.request_ids.pop(request_id)
        if request_id in self.waiting:
            del self.waiting[request_id]
            self.queued_tokens -= tokens
        self.kv_tokens -= tokens
        self.blocks_committed -= self.capacity.blocks_for(tokens)
        self._weigh()
        return tokens

    def _expect(self, migration_id: MigrationId, tokens: int) -> None:
        self.inbound[migration_id] = tokens
        self.inbound_tokens += tokens
        self.blocks_committed += self.capacity.blocks_for(tokens)
        self._weigh()

    def _expect_no_more(self, migration_id: MigrationId) -> None:
        tokens = self.inbound.pop(migration_id, None)
        if tokens is not None:
            self.inbound_tokens -= tokens
            self.blocks_committed -= self.capacity.blocks_for(tokens)
            self._weigh()

    def _follow(self, report: InstanceReport) -> None:
        """Take over a report. Requests it names that are not here (any more) are left out."""
        lengths = self.request_ids
        known = len(lengths)
        lengths.update(zip(report.running_ids, report.running_tokens, strict=True))
        if report.waiting_ids:
            lengths.update(zip(report.waiting_ids, report.waiting_tokens, strict=True))
        while len(lengths) > known:  # a dict keeps its order: strangers came in last
            lengths.popitem()
        self.kv_tokens = sum(lengths.values())
        # Blocks of requests on their way here are reserved, so in use, when the ask for room has been granted, which takes
        # milliseconds: the report counts them.
        self.blocks_committed = report.kv_blocks_used
        if self.waiting or report.waiting_ids:
            self._follow_queue(report)
        if report.step_s > 0.0:
            self.step_s = report.step_s
        self._weigh()

    def _follow_queue(self, report: InstanceReport) -> None:
        running = set(report.running_ids)
        waiting = {request_id: None for request_id in self.waiting if request_id not in running}
        waiting.update({request_id: None for request_id in report.waiting_ids if request_id in self.request_ids})
        self.waiting = waiting
        lengths = [self.request_ids[request_id] for request_id in waiting]
        self.queued_tokens = sum(lengths)
        self.blocks_committed += sum(map(self.capacity.blocks_for, lengths))


@dataclass(slots=True, eq=False)
class RequestView:
    """
    What a policy knows of one request.

    Attributes:
        arrival: Its number in order of arrival.
        settled_tokens: Sequence length while it is on no instance.
        place: Where it runs or waits; None while it waits for its dispatch.
        migration_id: The migration it takes part in, or None.

    """

    request_id: RequestId
    arrival: int
    prompt_tokens: int
    max_output_tokens: int
    settled_tokens: int
    pin_reason: PinReason | None = None
    prefix_hashes: tuple[int, ...] = ()
    priority: int = 0
    place: InstanceView | None = None
    migration_id: MigrationId | None = None

    @property
    def instance_id(self) -> InstanceId | None:
        """Where it runs or waits; None while it waits for its dispatch."""
        return None if self.place is None else self.place.instance_id

    @property
    def tokens(self) -> int:
        """Sequence length at the last report (prompt and output so far)."""
        return self.settled_tokens if self.place is None else self.place.request_ids[self.request_id]


class ClusterView:
    """The cluster as a policy sees it. See the module header."""

    def __init__(self, pricing: Callable[[InstanceCapacity], Pricing] | None = None) -> None:
        """
        Start with no instance and no request.

        Args:
            pricing: What a step of an instance costs, for `InstanceView.price`; None: prices only count requests.
        """
        self._pricing = pricing
        self.instances: dict[InstanceId, InstanceView] = {}
        self.requests: dict[RequestId, RequestView] = {}
        self._available: list[InstanceView] = []
        self._unplaced: dict[RequestId, RequestView] = {}
        self._arrivals = 0

    def available(self) -> Sequence[InstanceView]:
        """Instances that take new requests, sorted by id. A snapshot: later changes make another."""
        return self._available

    def unplaced(self) -> list[RequestView]:
        """Requests that wait for a dispatch, in order of arrival."""
        return sorted(self._unplaced.values(), key=attrgetter("arrival"))

    def waits(self) -> int:
        """How many requests wait for a dispatch."""
        return len(self._unplaced)

    def apply(self, event: Event) -> None:  # noqa: C901 - one arm per event
        """Follow one event. Unknown ids are ignored: a report can cross a finish."""
        match event:
            case InstanceReported():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance._follow(event.report)  # noqa: SLF001 - one writer, this module
            case MessageReceived() | TimerFired():
                return
            case RequestArrived():
                self._arrive(event)
            case RequestFinished():
                self._remove(event.request_id)
            case MigrationEnded():
                self._end_migration(event)
            case InstanceJoined():
                pricing = Pricing() if self._pricing is None else self._pricing(event.capacity)
                self.instances[event.instance_id] = InstanceView(event.instance_id, event.capacity, pricing)
                self._find_available()
            case InstanceDraining():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance.draining = True
                    self._find_available()
            case InstanceLost():
                self._lose(event)

    def carry_out(self, effects: list[Effect]) -> None:
        """Note what the policy itself has just decided, so that its next decision knows."""
        for effect in effects:
            if isinstance(effect, Dispatch):
                self._place(effect.request_id, effect.instance_id)
            elif isinstance(effect, StartMigration):
                self._start_migration(effect)
            elif isinstance(effect, Reject):
                self._remove(effect.request_id)

    def _find_available(self) -> None:
        self._available = [i for _, i in sorted(self.instances.items()) if not i.draining]

    def _arrive(self, event: RequestArrived) -> None:
        self._arrivals += 1
        request = RequestView(
            event.request_id,
            self._arrivals,
            event.prompt_tokens,
            event.max_output_tokens,
            event.prompt_tokens,
            event.pin_reason,
            event.prefix_hashes,
            event.priority,
        )
        self.requests[event.request_id] = request
        self._unplaced[event.request_id] = request

    def _place(self, request_id: RequestId, instance_id: InstanceId, *, waits: bool = True) -> None:
        request = self.requests.get(request_id)
        instance = self.instances.get(instance_id)
        if request is None or instance is None:
            return
        if request.place is not None:
            self._take_away(request)
        self._unplaced.pop(request_id, None)
        instance._add(request_id, request.settled_tokens, waits=waits)  # noqa: SLF001 - one writer, this module
        request.place = instance

    def _take_away(self, request: RequestView) -> None:
        if request.place is not None:
            request.settled_tokens = request.place._drop(request.request_id)  # noqa: SLF001 - one writer
            request.place = None
        self._unplaced[request.request_id] = request

    def _remove(self, request_id: RequestId) -> None:
        request = self.requests.pop(request_id, None)
        if request is not None:
            self._take_away(request)
            del self._unplaced[request_id]

    def _lose(self, event: InstanceLost) -> None:
        instance = self.instances.pop(event.instance_id, None)
        self._find_available()
        tokens_of = dict(zip(event.orphan_ids, event.orphan_tokens, strict=True))
        # A migrating request still counts here while it goes on at its target: `MigrationEnded` will say where it is.
        ids_here = list(instance.request_ids) if instance is not None else []
        placed_here = [request_id for request_id in ids_here if self.requests[request_id].migration_id is None]
        for request_id in {**dict.fromkeys(placed_here), **dict.fromkeys(event.orphan_ids)}:
            request = self.requests.get(request_id)
            if request is None:
                continue
            self._take_away(request)  # an orphan may still count elsewhere: at the source of a migration that was lost
            request.settled_tokens = max(request.settled_tokens, tokens_of.get(request_id, 0))

    def _start_migration(self, effect: StartMigration) -> None:
        request = self.requests.get(effect.request_id)
        source = self.instances.get(effect.source_id)
        target = self.instances.get(effect.target_id)
        if request is not None:
            request.migration_id = effect.migration_id
        if source is not None:
            source.outbound[effect.migration_id] = None
        if target is not None and request is not None:
            target._expect(effect.migration_id, request.tokens)  # noqa: SLF001 - one writer, this module

    def _end_migration(self, event: MigrationEnded) -> None:
        if (source := self.instances.get(event.source_id)) is not None:
            source.outbound.pop(event.migration_id, None)
        if (target := self.instances.get(event.target_id)) is not None:
            target._expect_no_more(event.migration_id)  # noqa: SLF001 - one writer, this module
        request = self.requests.get(event.request_id)
        if request is None or request.migration_id != event.migration_id:
            return
        request.migration_id = None
        if event.outcome in (MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED):
            self._take_away(request)
            self._place(event.request_id, event.target_id, waits=False)
        elif event.outcome is MigrationOutcome.LOST:
            self._take_away(request)
