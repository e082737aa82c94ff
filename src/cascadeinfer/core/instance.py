"""
One instance in a policy's books: its requests, its load, and the cost of its next step.

Everything read per decision is kept up to date rather than computed on demand: a change costs O(1), a report O(requests
there) in C loops (`dict.update`, `sum`), and reading an instance's load one attribute access. Lengths live here
(`request_ids`), because a report brings them all at once. Only `ClusterView` (`core/view.py`) calls the methods that
change an instance.
"""

from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.pace import Pace
from cascadeinfer.core.types import InstanceCapacity, InstanceId, MigrationId, RequestId

CROWDED: Final = 0.6
"""KV cache share above which the price exceeds that of the steps alone: requests grow, and a full cache preempts."""
CROWDING: Final = 4.0
"""Price of a full instance relative to its price by steps alone, minus one. In simulation at 90 % of capacity this
value gave a third fewer preemptions.
"""


@dataclass(slots=True)
class Pricing:
    """
    What a step of an instance costs its requests: `price = (requests + 1) * (base + per_request * requests + per_token
    * tokens + urgency * queue) * crowding`. This is the total of seconds that all requests there, plus a newcomer, wait
    per token, including the newcomer's amortised wait for its first. `crowding = 1 + CROWDING * (excess of the KV share
    over CROWDED, as a share of what is left)^2`.

    `queue` is the time to compute what does not decode yet: `sum(per_queued_token * tokens + per_queued_pair *
    tokens^2)`. Times have the unit of `base`.

    Attributes:
        base: Cost of an empty step.
        per_request: Cost per request.
        per_token: Cost per token of the requests' lengths.
        per_queued_token: Cost per token to be computed.
        per_queued_pair: Half the cost of one token's attention to another during prefill.
        urgency: Share of the wait for the first token that counts per token of a newcomer: one over the number of
            tokens it will produce. May change.
        in_seconds: Whether times are in seconds; if not, in empty steps.
    """

    base: float = 1.0
    per_request: float = 0.0
    per_token: float = 0.0
    per_queued_token: float = 0.0
    per_queued_pair: float = 0.0
    urgency: float = 0.0
    in_seconds: bool = False

    def full_step(self, max_batched_tokens: int) -> float:
        """Time to compute as many prompt tokens as one step takes, without their attention."""
        return self.per_queued_token * max_batched_tokens

    def queue_of(self, tokens: int) -> float:
        """Time to compute a sequence of this length."""
        return tokens * (self.per_queued_token + self.per_queued_pair * tokens)


@dataclass(slots=True, eq=False)
class InstanceView:
    """
    What a policy knows of one instance.

    Attributes:
        capacity: Capacity of its kind.
        request_ids: Requests placed here, waiting or running, with their lengths in tokens at the last report, in order
            of placement.
        kv_tokens: Sum of their lengths.
        waiting: Requests that waited at the last report or were placed since, so have not been seen running.
        inbound: Requests migrating to this instance, with their lengths in tokens.
        inbound_tokens: Sum of those lengths.
        pushes: Those of them that come from an instance for prompts; no limit on migrations counts them.
        outbound: Migrations that leave here.
        foreign_requests: Requests here that belong to other front-end processes, at the last report.
        foreign_tokens: Sum of their lengths.
        foreign_waiting_tokens: Lengths of those that wait.
        foreign_queue: Time to compute those, see `Pricing`.
        blocks_committed: Blocks in use at the last report, plus what requests that wait here, arrived since or are
            migrating here will need, minus what has left since.
        step_s: Mean step time at the last report that had one, 0.0 before.
        starting: Requests not known to decode yet, with their length at placement: they wait, or are being computed.
        queue: Time to compute those, see `Pricing`.
        suspect: Its report is overdue.
        shunned: It is suspect while another is not: nothing new goes there.
        pace: The steps that it has reported.
        slowness: Its step times relative to those of its peers, 1.0 unless it matters (`core/pace.py`).
        lag: The same, relative only to peers priced by the same step model: something other than their content makes
            its steps long.
        load: The larger of its KV share and its batch share, counting everything here (foreign or not) and on its way
            here; 1.0 is full.
        price: See `Pricing`; multiplied by `slowness`.
    """

    instance_id: InstanceId
    kind: InstanceKind
    pricing: Pricing = field(default_factory=Pricing)
    draining: bool = False
    suspect: bool = False
    shunned: bool = False
    pace: Pace = field(default_factory=Pace)
    slowness: float = 1.0
    lag: float = 1.0
    request_ids: dict[RequestId, int] = field(default_factory=dict)
    kv_tokens: int = 0
    waiting: dict[RequestId, None] = field(default_factory=dict)
    inbound: dict[MigrationId, int] = field(default_factory=dict)
    inbound_tokens: int = 0
    pushes: dict[MigrationId, None] = field(default_factory=dict)
    outbound: dict[MigrationId, None] = field(default_factory=dict)
    foreign_requests: int = 0
    foreign_tokens: int = 0
    foreign_waiting_tokens: tuple[int, ...] = ()
    foreign_queue: float = 0.0
    blocks_committed: int = 0
    step_s: float = 0.0
    starting: dict[RequestId, int] = field(default_factory=dict)
    queue: float = 0.0
    load: float = 0.0
    price: float = 0.0
    capacity: InstanceCapacity = field(init=False, repr=False)
    _per_token: float = field(init=False, repr=False)
    _per_request: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare what `load` is computed from."""
        self.capacity = self.kind.capacity
        self._per_token = 1.0 / self.capacity.kv_tokens
        self._per_request = 1.0 / self.capacity.max_num_seqs
        self._weigh()

    @property
    def migrations(self) -> int:
        """Migrations this instance takes part in, in either direction, without pushes."""
        return len(self.inbound) - len(self.pushes) + len(self.outbound)

    @property
    def slowed_load(self) -> float:
        """
        The load as a newcomer experiences it: that of an equivalent instance of usual speed, i.e. scaled by `slowness`.

        A slow instance counts the newcomer itself; otherwise it would look as good as any other while empty.
        """
        return self.load if self.slowness == 1.0 else (self.load + self._per_request) * self.slowness

    @property
    def committed_kv_tokens(self) -> int:
        """Tokens here or on their way here."""
        return self.kv_tokens + self.inbound_tokens + self.foreign_tokens

    @property
    def committed_requests(self) -> int:
        """Requests here or on their way here."""
        return len(self.request_ids) + len(self.inbound) + self.foreign_requests

    def price_with(self, more_requests: int, more_tokens: int) -> float:
        """The price with this much more on its way here."""
        pricing = self.pricing
        requests = len(self.request_ids) + len(self.inbound) + self.foreign_requests + more_requests
        tokens = self.kv_tokens + self.inbound_tokens + self.foreign_tokens + more_tokens
        step = pricing.base + pricing.per_request * requests + pricing.per_token * tokens
        price = (requests + 1) * (step + pricing.urgency * (self.queue + self.foreign_queue))
        excess = tokens * self._per_token - CROWDED
        if excess > 0.0:
            price *= 1.0 + CROWDING * (excess / (1.0 - CROWDED)) ** 2
        return price * self.slowness

    def marginal_price(self, tokens: int, cached_tokens: int) -> float:
        """
        Cost per token, to all requests here and to itself, of one more request of this length with this many leading
        tokens cached here.

        Unlike `price` it is comparable between instances whose requests differ in length.
        """
        pricing = self.pricing
        requests = self.committed_requests
        more = pricing.per_request + pricing.per_token * tokens
        step = pricing.base + pricing.per_request * requests + pricing.per_token * self.committed_kv_tokens
        computed = pricing.queue_of(tokens) - pricing.queue_of(cached_tokens)
        waited = self.queue + self.foreign_queue + (requests + 1) * computed
        return (step + (requests + 1) * more + pricing.urgency * waited) * self.slowness

    @property
    def backlog(self) -> float:
        """Time to compute the prompts that wait here, in the unit of the pricing; longer on a slow instance."""
        return (self.queue + self.foreign_queue) * self.slowness

    def free_blocks(self) -> int:
        """Blocks that nothing here or on its way here needs at its present length; negative when overcommitted."""
        return self.capacity.kv_blocks - self.blocks_committed

    def _weigh(self) -> None:
        """Update `load` and `price`; called after every change."""
        by_tokens = (self.kv_tokens + self.inbound_tokens + self.foreign_tokens) * self._per_token
        by_requests = (len(self.request_ids) + len(self.inbound) + self.foreign_requests) * self._per_request
        self.load = max(by_requests, by_tokens)
        self.price = self.price_with(0, 0)

    def set_slowness(self, slowness: float) -> None:
        """Record how slow it is relative to the others."""
        if slowness != self.slowness:
            self.slowness = slowness
            self._weigh()

    def become(self, kind: InstanceKind, pricing: Pricing) -> None:
        """It has another role or token budget. What it can hold is the same."""
        self.kind, self.capacity, self.pricing = kind, kind.capacity, pricing
        self.reprice()

    def reprice(self) -> None:
        """The pricing has changed."""
        self.queue = sum(map(self.pricing.queue_of, self.starting.values()))
        self.foreign_queue = sum(map(self.pricing.queue_of, self.foreign_waiting_tokens))
        self._weigh()

    def add(self, request_id: RequestId, tokens: int, *, waits: bool) -> None:
        """A request was placed here; a migrated one decodes, any other waits first."""
        self.request_ids[request_id] = tokens
        if waits:
            self.waiting[request_id] = None
            self.starting[request_id] = tokens
            self.queue += self.pricing.queue_of(tokens)
        self.kv_tokens += tokens
        self.blocks_committed += self.capacity.blocks_for(tokens)
        self._weigh()

    def drop(self, request_id: RequestId) -> int:
        """A request has left. Returns its length."""
        tokens = self.request_ids.pop(request_id)
        self.waiting.pop(request_id, None)
        if (placed_tokens := self.starting.pop(request_id, None)) is not None:
            self.queue -= self.pricing.queue_of(placed_tokens)
        self.kv_tokens -= tokens
        self.blocks_committed -= self.capacity.blocks_for(tokens)
        self._weigh()
        return tokens

    def first_token(self, request_id: RequestId, tokens: int) -> None:
        """A request here has this many tokens and its first one: nothing of it is left to compute."""
        self.kv_tokens += tokens - self.request_ids[request_id]
        self.request_ids[request_id] = tokens
        self.waiting.pop(request_id, None)
        if (placed_tokens := self.starting.pop(request_id, None)) is not None:
            self.queue -= self.pricing.queue_of(placed_tokens)
        self._weigh()

    def expect(self, migration_id: MigrationId, tokens: int, *, pushed: bool = False) -> None:
        """A request is on its way here; `pushed`: from an instance for prompts."""
        if pushed:
            self.pushes[migration_id] = None
        self.inbound[migration_id] = tokens
        self.inbound_tokens += tokens
        self.blocks_committed += self.capacity.blocks_for(tokens)
        self._weigh()

    def expect_no_more(self, migration_id: MigrationId) -> None:
        """The expected request has arrived, or will not come."""
        tokens = self.inbound.pop(migration_id, None)
        self.pushes.pop(migration_id, None)
        if tokens is not None:
            self.inbound_tokens -= tokens
            self.blocks_committed -= self.capacity.blocks_for(tokens)
            self._weigh()

    def follow(self, report: InstanceReport) -> None:
        """Apply a report. Requests in it that are not here (any more) are ignored."""
        lengths = self.request_ids
        known = len(lengths)
        lengths.update(zip(report.running_ids, report.running_tokens, strict=True))
        if report.waiting_ids:
            lengths.update(zip(report.waiting_ids, report.waiting_tokens, strict=True))
        while len(lengths) > known:  # a dict keeps its order: strangers came in last
            lengths.popitem()
        self.kv_tokens = sum(lengths.values())
        # Blocks of inbound requests are reserved, so in use, once the ask for room has been granted, which takes
        # milliseconds: the report counts them.
        self.blocks_committed = report.kv_blocks_used
        if self.starting or report.waiting_ids:
            self._follow_queue(report)
        if self.foreign_requests or report.foreign_running_tokens or report.foreign_waiting_tokens:
            self._follow_foreign(report.foreign_running_tokens, report.foreign_waiting_tokens)
        if report.step_s > 0.0:
            self.step_s = report.step_s
        self._weigh()

    def _follow_foreign(self, running_tokens: tuple[int, ...], waiting_tokens: tuple[int, ...]) -> None:
        """What other front-end processes have here. The report's block count includes their running requests."""
        self.foreign_requests = len(running_tokens) + len(waiting_tokens)
        self.foreign_tokens = sum(running_tokens) + sum(waiting_tokens)
        self.foreign_waiting_tokens = waiting_tokens
        self.foreign_queue = sum(map(self.pricing.queue_of, waiting_tokens))
        self.blocks_committed += sum(map(self.capacity.blocks_for, waiting_tokens))

    def _follow_queue(self, report: InstanceReport) -> None:
        running = set(report.running_ids)
        waiting = {request_id: None for request_id in self.waiting if request_id not in running}
        waiting.update({request_id: None for request_id in report.waiting_ids if request_id in self.request_ids})
        self.waiting = waiting
        blocks_for = self.capacity.blocks_for
        self.blocks_committed += sum([blocks_for(self.request_ids[request_id]) for request_id in waiting])
        starting = {r: placed for r, placed in self.starting.items() if r in waiting or self.request_ids[r] <= placed}
        for request_id in waiting:  # one that ran before is recomputed with all its tokens
            starting.setdefault(request_id, self.request_ids[request_id])
        self.starting = starting
        self.queue = sum(map(self.pricing.queue_of, starting.values()))
