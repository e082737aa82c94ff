"""
A policy's books: which instances exist, where requests are, how loaded each instance is.

There is one writer: `ClusterView.apply(event)` (and `carry_out` for the policy's own decisions). Policies only read.
Between two reports an instance's load is corrected by what was dispatched to it, migrated and finished since, so that a
burst of arrivals does not all land on the instance that was idle at the last report. Dicts keep insertion order, and
ids are sorted where order matters: no decision depends on hashing.

`core/instance.py` has the numbers of one instance. An event costs O(1), a report O(requests there) in C loops.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from cascadeinfer.core.effects import Dispatch, Effect, MigrationReason, Reject, StartMigration
from cascadeinfer.core.events import (
    Event,
    FirstToken,
    InstanceChanged,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReported,
    InstanceSuspected,
    InstanceTrusted,
    LayoutAnnounced,
    MessageReceived,
    MigrationEnded,
    MigrationOutcome,
    PinReason,
    RequestArrived,
    RequestFinished,
    TimerFired,
    WorkloadSeen,
)
from cascadeinfer.core.instance import InstanceView, Pricing
from cascadeinfer.core.kind import InstanceKind, StepModelKey
from cascadeinfer.core.links import Links
from cascadeinfer.core.pace import Costs, slowness_of
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId

__all__ = ["ClusterView", "InstanceView", "Pricing", "RequestView"]


@dataclass(slots=True, eq=False)
class RequestView:
    """
    What a policy knows of one request.

    Attributes:
        arrival: Its number in order of arrival.
        settled_tokens: Sequence length while it is on no instance.
        place: Where it runs or waits; None while it waits for its dispatch.
        migration_id: The migration it takes part in, or None.
        parked: It was dispatched to be parked with its first token (`core/parking.py`): only a push moves it.
        model_version: While it is on no instance: the version that has written its output; None if it has none.

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
    parked: bool = False
    model_version: str | None = None

    @property
    def instance_id(self) -> InstanceId | None:
        """Where it runs or waits; None while it waits for its dispatch."""
        return None if self.place is None else self.place.instance_id

    @property
    def tokens(self) -> int:
        """Sequence length at the last report (prompt and output so far)."""
        return self.settled_tokens if self.place is None else self.place.request_ids[self.request_id]

    @property
    def longest_tokens(self) -> int:
        """Longest sequence length that its own cap allows. A bound, not a forecast."""
        return self.prompt_tokens + self.max_output_tokens

    def may_run_on(self, kind: InstanceKind) -> bool:
        """Whether it may be moved to an instance of this kind with its KV cache, or dispatched there."""
        if self.place is not None:
            return kind.kv_group == self.place.kind.kv_group
        return self.model_version in {None, kind.model_version}


class ClusterView:
    """The cluster as a policy sees it. See the module header."""

    def __init__(self, pricing: Callable[[InstanceKind], Pricing] | None = None) -> None:
        """
        Start with no instance and no request.

        Args:
            pricing: Step costs of an instance of a kind, for `InstanceView.price`, in one unit for all kinds; None:
                prices only count requests.
        """
        self._make_pricing = pricing
        self._pricings: dict[InstanceKind, Pricing] = {}
        self._urgency: float | None = None
        self._alike: dict[StepModelKey, list[InstanceView]] = {}
        self._least_kv_tokens = 0
        self._most_kv_tokens = 0
        self._is_mixed = False
        self.instances: dict[InstanceId, InstanceView] = {}
        self.requests: dict[RequestId, RequestView] = {}
        self._aside: frozenset[InstanceId] = frozenset()
        self._members: list[InstanceView] = []
        self._available: list[InstanceView] = []
        #: How fast KV cache goes between nodes.
        self.links = Links()
        self._costs = Costs()
        #: Those that may count as slower than others, or lag; all others do not.
        self._slowed: dict[InstanceId, float] = {}
        self._unplaced: dict[RequestId, RequestView] = {}
        self._arrivals = 0

    def available(self) -> Sequence[InstanceView]:
        """
        Instances that take new requests, sorted by id. A snapshot: later changes produce a new one.

        Suspected instances are left out as long as another is available.
        """
        return self._available

    def members(self) -> Sequence[InstanceView]:
        """Instances that are not draining, suspected or not, sorted by id; stages consist of them. A snapshot."""
        return self._members

    def set_aside(self, instance_ids: Collection[InstanceId]) -> None:
        """Count these, now or when they join, neither as members nor as available: their policy sees to them."""
        self._aside = frozenset(instance_ids)
        self._find_available()

    def able(self, request: RequestView, instances: Sequence[InstanceView]) -> Sequence[InstanceView]:
        """
        The instances among these that may take the request (`RequestView.may_run_on`) and whose whole KV cache can hold
        it at its longest: on any other it could get stuck for good.

        A cap larger than every cache seen so far says nothing, and counts as the largest of them. If all can, the same
        sequence is returned.
        """
        longest = self._longest_tokens(request)
        if longest <= self._least_kv_tokens and not self._is_mixed:
            return instances
        return [i for i in instances if i.capacity.kv_tokens >= longest and request.may_run_on(i.kind)]

    def able_ids(self, request: RequestView, instance_ids: Sequence[InstanceId]) -> Sequence[InstanceId]:
        """`able`, by id. Kinds are as public as the layout, and agents use this too."""
        longest = self._longest_tokens(request)
        if longest <= self._least_kv_tokens and not self._is_mixed:
            return instance_ids
        known = [self.instances[i] for i in instance_ids if i in self.instances]
        return [i.instance_id for i in self.able(request, known)]

    def _longest_tokens(self, request: RequestView) -> int:
        return min(request.longest_tokens, self._most_kv_tokens)

    def unplaced(self) -> list[RequestView]:
        """Requests waiting for a dispatch, in the order in which they should run: by priority, then arrival."""
        return sorted(self._unplaced.values(), key=attrgetter("priority", "arrival"))

    def waits(self) -> int:
        """Number of requests waiting for a dispatch."""
        return len(self._unplaced)

    def apply(self, event: Event) -> None:  # noqa: C901, PLR0912 - one arm per event
        """Apply one event. Unknown ids are ignored, because a report can cross a finish."""
        match event:
            case InstanceReported():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance.follow(event.report)
                    if instance.pace.note(event.report.steps, event.report.intervals):
                        self._compare_pace(instance)
            case MessageReceived() | LayoutAnnounced() | WorkloadSeen() | TimerFired():
                return
            case RequestArrived():
                self._arrive(event)
            case FirstToken():
                request = self.requests.get(event.request_id)
                if request is not None and request.place is not None:
                    request.place.first_token(event.request_id, request.tokens + 1)
            case RequestFinished():
                self._remove(event.request_id)
            case MigrationEnded():
                self._end_migration(event)
            case InstanceJoined():
                pricing = self._pricing_for(event.kind)
                self.links.joined(event.instance_id, event.node)
                self.instances[event.instance_id] = InstanceView(event.instance_id, event.kind, pricing)
                self._costs.note(event.instance_id, None)
                self._find_alike()
                self._find_available()
            case InstanceChanged():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance.become(event.kind, self._pricing_for(event.kind))
            case InstanceDraining():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance.draining = True
                    self._find_available()
            case InstanceSuspected():
                self._suspect(event)
            case InstanceTrusted():
                if (instance := self.instances.get(event.instance_id)) is not None:
                    instance.suspect = False
                    self._find_available()
            case InstanceLost():
                self._lose(event)

    def carry_out(self, effects: list[Effect]) -> None:
        """Record the policy's own decision, so that its next one takes it into account."""
        for effect in effects:
            if isinstance(effect, Dispatch):
                self._place(effect.request_id, effect.instance_id)
                if effect.park and (request := self.requests.get(effect.request_id)) is not None:
                    request.parked = True
            elif isinstance(effect, StartMigration):
                self._start_migration(effect)
            elif isinstance(effect, Reject):
                self._remove(effect.request_id)

    def reprice(self, pricing: Callable[[InstanceKind], Pricing]) -> None:
        """Use new pricing. Prices follow as instances change; the weight of the wait for the first token is kept."""
        self._make_pricing = pricing
        for kind, old in self._pricings.items():
            new = pricing(kind)
            for name in Pricing.__slots__:
                if name != "urgency":
                    setattr(old, name, getattr(new, name))
        self._costs.clear()
        for instance_id, instance in self.instances.items():
            instance.reprice()
            self._costs.note(instance_id, instance.pace.cost(instance.pricing))

    def set_urgency(self, urgency: float) -> None:
        """Change the weight of the wait for the first token (`Pricing.urgency`); prices follow as instances change."""
        self._urgency = urgency
        for pricing in self._pricings.values():
            pricing.urgency = urgency

    def _pricing_for(self, kind: InstanceKind) -> Pricing:
        if kind not in self._pricings:
            made = Pricing() if self._make_pricing is None else self._make_pricing(kind)
            if self._urgency is not None:
                made.urgency = self._urgency
            self._pricings[kind] = made
        return self._pricings[kind]

    def _find_alike(self) -> None:
        """
        After instances came or went: find those that share a step model, the sizes of their caches, and whether some
        request cannot run on all of them.
        """
        self._alike = {}
        for instance in self.instances.values():
            self._alike.setdefault(instance.kind.step_model_key, []).append(instance)
        self._least_kv_tokens = min((i.capacity.kv_tokens for i in self.instances.values()), default=0)
        self._most_kv_tokens = max(self._most_kv_tokens, *(i.capacity.kv_tokens for i in self.instances.values()), 0)
        here = {instance.kind.model_version for instance in self.instances.values()}
        wanted = {request.model_version for request in self._unplaced.values()} - {None}
        groups = {instance.kind.kv_group for instance in self.instances.values()}
        self._is_mixed = len(groups) > 1 or len(here | wanted) > 1

    def _find_available(self) -> None:
        present = [instance for _, instance in sorted(self.instances.items()) if not instance.draining]
        self._members = [instance for instance in present if instance.instance_id not in self._aside]
        any_trusted = any(not instance.suspect for instance in present)
        self._available = [i for i in self._members if not i.suspect] if any_trusted else self._members
        for instance in self.instances.values():
            instance.shunned = instance.suspect and any_trusted

    def _suspect(self, event: InstanceSuspected) -> None:
        if (instance := self.instances.get(event.instance_id)) is not None:
            instance.suspect = True
            self._find_available()
        for request_id in event.withdrawn_ids:
            request = self.requests.get(request_id)
            if request is not None and request.instance_id == event.instance_id:
                self._take_away(request)

    def _compare_pace(self, instance: InstanceView) -> None:
        """An instance has reported its pace: update the relative slowness of all."""
        self._costs.note(instance.instance_id, instance.pace.cost(instance.pricing))
        slow = self._costs.slow({i: self.instances[i].slowness for i in self._slowed if i in self.instances})
        one_model = len(self._alike) == 1
        for instance_id in self._slowed | slow:
            if (other := self.instances.get(instance_id)) is not None:
                other.set_slowness(slow.get(instance_id, 1.0))
                if one_model:
                    other.lag = other.slowness
        self._slowed = slow if one_model else dict.fromkeys(self.instances, 1.0)
        if not one_model:
            for alike in self._alike.values():
                self._compare_alike(alike)

    def _compare_alike(self, alike: Sequence[InstanceView]) -> None:
        """Update the relative slowness of instances priced by one step model."""
        costs = self._costs.among(i.instance_id for i in alike)
        lags = slowness_of(costs, {i.instance_id: i.lag for i in alike})
        for instance in alike:
            instance.lag = lags.get(instance.instance_id, 1.0)

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
        instance.add(request_id, request.settled_tokens, waits=waits)
        request.place = instance

    def _take_away(self, request: RequestView, least_tokens: int = 0) -> None:
        request.parked = False
        if request.place is not None:
            request.settled_tokens = max(least_tokens, request.place.drop(request.request_id))
            if request.settled_tokens > request.prompt_tokens:
                request.model_version = request.place.kind.model_version
            request.place = None
        self._unplaced[request.request_id] = request

    def _remove(self, request_id: RequestId) -> None:
        request = self.requests.pop(request_id, None)
        if request is not None:
            self._take_away(request)
            del self._unplaced[request_id]

    def _lose(self, event: InstanceLost) -> None:
        instance = self.instances.pop(event.instance_id, None)
        self.links.left(event.instance_id)
        self._costs.note(event.instance_id, None)
        self._find_available()
        tokens_of = dict(zip(event.orphan_ids, event.orphan_tokens, strict=True))
        # A migrating request counts here even once it runs at its target: `MigrationEnded` will say where it is.
        ids_here = list(instance.request_ids) if instance is not None else []
        placed_here = [request_id for request_id in ids_here if self.requests[request_id].migration_id is None]
        for request_id in {**dict.fromkeys(placed_here), **dict.fromkeys(event.orphan_ids)}:
            request = self.requests.get(request_id)
            if request is None:
                continue
            # An orphan may still count elsewhere: at the source of a migration that was lost.
            n_tokens = tokens_of.get(request_id, 0)
            self._take_away(request, n_tokens)
            request.settled_tokens = max(request.settled_tokens, n_tokens)
        self._find_alike()

    def _start_migration(self, effect: StartMigration) -> None:
        request = self.requests.get(effect.request_id)
        source = self.instances.get(effect.source_id)
        target = self.instances.get(effect.target_id)
        if request is not None:
            request.migration_id = effect.migration_id
        pushed = effect.reason is MigrationReason.PREFILLED
        if source is not None and not pushed:
            source.outbound[effect.migration_id] = None
        if target is not None and request is not None:
            target.expect(effect.migration_id, request.tokens, pushed=pushed)

    def _end_migration(self, event: MigrationEnded) -> None:
        if (source := self.instances.get(event.source_id)) is not None:
            source.outbound.pop(event.migration_id, None)
        if (target := self.instances.get(event.target_id)) is not None:
            target.expect_no_more(event.migration_id)
        self.links.pulled(event.source_id, event.target_id, event.pulled_tokens, event.pull_s, event.copied_tokens)
        request = self.requests.get(event.request_id)
        if request is None or request.migration_id != event.migration_id:
            return
        request.migration_id = None
        if event.outcome in (MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED):
            self._take_away(request)
            self._place(event.request_id, event.target_id, waits=False)
        elif event.outcome is MigrationOutcome.LOST:
            self._take_away(request)
