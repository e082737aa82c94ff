"""
A shell without engines: drives a policy by commands, keeps books of its effects, and checks each against the contract.

Used by the contract suite (random commands), the golden transcripts (written commands) and the tests of single
policies. A request waits until its instance's first report and runs from then on; it grows only on command. One that is
to be parked is parked when it would grow first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cascadeinfer.core.choice import HIGHEST_WINS, MOST_SCORED, Choice
from cascadeinfer.core.effects import (
    AdviseScale,
    AssignTerms,
    Dispatch,
    Effect,
    MigrationReason,
    PublishLayout,
    Reject,
    SendMessage,
    StartMigration,
)
from cascadeinfer.core.events import (
    Event,
    FirstToken,
    InstanceChanged,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    InstanceSuspected,
    InstanceTrusted,
    MessageReceived,
    MigrationEnded,
    MigrationOutcome,
    PinReason,
    RequestArrived,
    RequestFinished,
    TimerFired,
)
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity, InstanceId, MigrationId, RequestId

SMALL = InstanceCapacity(kv_blocks=256, block_size_tokens=16, max_num_seqs=8, max_batched_tokens=512)
"""4,096 tokens and 8 requests: full within a few commands."""
LARGE = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=8192)


@dataclass
class WorldRequest:
    """A request as the shell knows it."""

    request_id: RequestId
    prompt_tokens: int
    max_output_tokens: int
    pin_reason: PinReason | None = None
    tokens: int = 0
    instance_id: InstanceId | None = None
    running: bool = False
    armed: bool = False
    parked: bool = False
    migration_id: MigrationId | None = None
    dispatches: int = 0


@dataclass
class World:
    """See the module header."""

    policy: Policy
    capacity: InstanceCapacity = SMALL
    max_migrations: int = 3
    may_hold_back: bool = False
    kinds: dict[InstanceId, InstanceKind] = field(default_factory=dict)
    """Instances that are not of `capacity` and the default step model."""
    now_s: float = 0.0
    draining: dict[InstanceId, bool] = field(default_factory=dict)
    suspects: set[InstanceId] = field(default_factory=set)
    requests: dict[RequestId, WorldRequest] = field(default_factory=dict)
    flying: list[SendMessage] = field(default_factory=list)
    moves: dict[MigrationId, StartMigration] = field(default_factory=dict)
    log: list[Effect] = field(default_factory=list)
    rejected: list[RequestId] = field(default_factory=list)
    _ids_used: set[MigrationId] = field(default_factory=set)
    _reports: int = 0
    _largest_tokens: int = 0

    # --- commands -----------------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> list[Effect]:
        """Pass an event to the policy and carry out its effects."""
        effects = self.policy.handle(event, self.now_s)
        for effect in effects:
            assert effect.cause == event.cause, "an effect names the cause of its event"
            self._carry_out(effect)
        self.log += effects
        for effect in effects:
            if isinstance(effect, Reject):
                effects = effects + self.emit(RequestFinished(effect.request_id, effect.request_id, 0))
            elif isinstance(effect, AssignTerms):
                kind = self.kinds[effect.instance_id] = self.kind_of(effect.instance_id).with_terms(effect.terms)
                effects = effects + self.emit(InstanceChanged(effect.cause, effect.instance_id, kind))
        return effects

    def join(self, *instance_ids: InstanceId) -> list[Effect]:
        """Instances become ready."""
        effects: list[Effect] = []
        for instance_id in instance_ids:
            self.draining[instance_id] = False
            self._largest_tokens = max(self._largest_tokens, self.kind_of(instance_id).capacity.kv_tokens)
            effects += self.emit(InstanceJoined(f"up:{instance_id}", instance_id, self.kind_of(instance_id)))
        self._check_placed()
        return effects

    def drain(self, instance_id: InstanceId) -> list[Effect]:
        """An instance stops taking new requests."""
        self.draining[instance_id] = True
        return self.emit(InstanceDraining(f"drain:{instance_id}", instance_id))

    def suspect(self, instance_id: InstanceId) -> list[Effect]:
        """An instance stops answering; requests that wait there are withdrawn if another instance answers."""
        self.suspects.add(instance_id)
        withdrawn = []
        if any(other != instance_id for other in self.trusted_instances()):
            here = [request for request in self.on(instance_id) if not request.parked]
            withdrawn = [request for request in here if not request.running and request.migration_id is None]
        for request in withdrawn:
            self._displace(request)
        ids = tuple(request.request_id for request in withdrawn)
        effects = self.emit(InstanceSuspected(f"silent:{instance_id}", instance_id, ids))
        self._check_placed()
        return effects

    def trust(self, instance_id: InstanceId) -> list[Effect]:
        """The instance answers again."""
        self.suspects.discard(instance_id)
        return self.emit(InstanceTrusted(f"answers:{instance_id}", instance_id))

    def lose(self, instance_id: InstanceId, *, name_lost: bool = True, at_target: bool = False) -> list[Effect]:
        """
        An instance dies; its migrations end first.

        Args:
            instance_id: The dead instance.
            name_lost: Whether the orphans include requests that were lost in a migration (both happens).
            at_target: Whether requests in migrations to or from it were already in the target's hands.
        """
        effects: list[Effect] = []
        orphans: list[RequestId] = []
        for move in list(self.moves.values()):
            if move.source_id == instance_id and at_target:
                effects += self.end(move.migration_id, MigrationOutcome.RECOMPUTED)
            elif move.source_id == instance_id or (move.target_id == instance_id and at_target):
                if name_lost:
                    orphans.append(move.request_id)
                effects += self.end(move.migration_id, MigrationOutcome.LOST)
            elif move.target_id == instance_id:
                effects += self.end(move.migration_id, MigrationOutcome.STAYED)
        orphans += [r.request_id for r in self.requests.values() if r.instance_id == instance_id]
        for request_id in orphans:
            self._displace(self.requests[request_id])
        del self.draining[instance_id]
        self.suspects.discard(instance_id)
        self.flying = [m for m in self.flying if instance_id not in {m.sender_id, m.recipient_id}]
        tokens = tuple(self.requests[request_id].tokens for request_id in orphans)
        effects += self.emit(InstanceLost(f"down:{instance_id}", instance_id, tuple(orphans), tokens))
        self._check_placed()
        return effects

    def arrive(
        self,
        request_id: RequestId,
        prompt_tokens: int,
        max_output_tokens: int = 4000,
        *,
        pin_reason: PinReason | None = None,
        prefix_hashes: Sequence[int] = (),
        priority: int = 0,
    ) -> list[Effect]:
        """A request arrives."""
        request = WorldRequest(request_id, prompt_tokens, max_output_tokens, pin_reason, prompt_tokens)
        self.requests[request_id] = request
        event = RequestArrived(
            request_id, request_id, prompt_tokens, max_output_tokens, tuple(prefix_hashes), pin_reason, priority
        )
        effects = self.emit(event)
        self._check_placed()
        return effects

    def finish(self, request_id: RequestId) -> list[Effect]:
        """A request ends; its migration ends first."""
        request = self.requests[request_id]
        effects: list[Effect] = []
        if request.migration_id is not None:
            effects += self.end(request.migration_id, MigrationOutcome.ENDED)
        del self.requests[request_id]
        output_tokens = request.tokens - request.prompt_tokens
        return effects + self.emit(RequestFinished(request_id, request_id, output_tokens))

    def grow(self, instance_id: InstanceId, tokens: int) -> None:
        """Running requests on an instance produce this many tokens each, up to their caps."""
        for request in self.on(instance_id):
            if request.running and request.armed:
                request.running, request.armed, request.parked = False, False, True
                request.tokens += 1
                self.emit(FirstToken(request.request_id, request.request_id, instance_id))
            elif request.running:
                request.tokens = min(request.tokens + tokens, request.prompt_tokens + request.max_output_tokens)

    def report(self, instance_id: InstanceId, *, step_s: float = 0.02) -> list[Effect]:
        """An instance reports; from now on, waiting requests that fit run."""
        here = [request for request in self.on(instance_id) if not request.parked]
        capacity = self.kind_of(instance_id).capacity
        running = [request for request in here if request.running]
        for request in here:
            if not request.running and len(running) < capacity.max_num_seqs:
                request.running = True
                running.append(request)
        waiting = [request for request in here if not request.running]
        self._reports += 1
        report = InstanceReport(
            tuple(r.request_id for r in running),
            tuple(r.tokens for r in running),
            tuple(r.request_id for r in waiting),
            tuple(r.tokens for r in waiting),
            min(capacity.kv_blocks, sum(capacity.blocks_for(r.tokens) for r in running)),
            step_s if running else 0.0,
        )
        return self.emit(InstanceReported(f"report:{instance_id}:{self._reports}", instance_id, report))

    def end(self, migration_id: MigrationId, outcome: MigrationOutcome, detail: str = "") -> list[Effect]:
        """A migration ends."""
        move = self.moves.pop(migration_id)
        request = self.requests.get(move.request_id)
        if request is not None:
            request.migration_id = None
            if outcome in {MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED}:
                request.instance_id = move.target_id
                request.running, request.parked = True, False
            elif outcome is MigrationOutcome.LOST:
                self._displace(request)
        return self.emit(
            MigrationEnded(move.cause, migration_id, move.request_id, move.source_id, move.target_id, outcome, detail)
        )

    def deliver(self, place: int = 0, *, twice: bool = False) -> list[Effect]:
        """The message at this position among those under way reaches its recipient."""
        message = self.flying.pop(place)
        event = MessageReceived(message.cause, message.sender_id, message.recipient_id, message.message)
        effects = self.emit(event)
        return effects + self.emit(event) if twice else effects

    def deliver_all(self, limit: int = 200) -> list[Effect]:
        """Deliver in the order of sending until nothing is under way."""
        effects: list[Effect] = []
        for _ in range(limit):
            if not self.flying:
                return effects
            effects += self.deliver()
        raise AssertionError(f"messages beget messages: {self.flying[:5]}")

    def advance(self, seconds: float) -> list[Effect]:
        """Time passes; timers fire when they are due."""
        until_s = self.now_s + seconds
        effects: list[Effect] = []
        for _ in range(1000):
            timer_s = self.policy.next_timer_s()
            if timer_s is None or timer_s > until_s:
                self.now_s = until_s
                return effects
            self.now_s = max(self.now_s, timer_s)
            effects += self.emit(TimerFired("timer"))
        raise AssertionError("a timer does not go away")

    # --- looks --------------------------------------------------------------------------------------------------------

    def on(self, instance_id: InstanceId) -> list[WorldRequest]:
        """The requests on an instance."""
        return [request for request in self.requests.values() if request.instance_id == instance_id]

    def kind_of(self, instance_id: InstanceId) -> InstanceKind:
        """What an instance is."""
        return self.kinds.get(instance_id, InstanceKind(self.capacity))

    def could_hold(self, instance_id: InstanceId, request: WorldRequest) -> bool:
        """Whether an instance's cache holds the request at its longest, with the cap limited by the largest cache."""
        longest = min(request.prompt_tokens + request.max_output_tokens, self._largest_tokens)
        return longest <= self.kind_of(instance_id).capacity.kv_tokens

    def open_instances(self) -> list[InstanceId]:
        """Instances that take requests."""
        return [instance_id for instance_id, draining in self.draining.items() if not draining]

    def trusted_instances(self) -> list[InstanceId]:
        """Instances that take requests and answer."""
        return [instance_id for instance_id in self.open_instances() if instance_id not in self.suspects]

    # --- effects ------------------------------------------------------------------------------------------------------

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Dispatch():
                request = self.requests[effect.request_id]
                assert request.instance_id is None, f"{effect}: it is on {request.instance_id} already"
                assert effect.request_id not in self.rejected, f"{effect}: it was refused"
                assert self.draining.get(effect.instance_id) is False, f"{effect}: that takes no requests"
                self._check_answers(effect, effect.instance_id)
                check_choice(effect.choice, effect.instance_id)
                assert self.could_hold(effect.instance_id, request), f"{effect}: it does not fit there"
                assert not (effect.park and request.pin_reason), f"{effect}: it is pinned"
                request.instance_id = effect.instance_id
                request.armed = effect.park
                request.dispatches += 1
            case Reject():
                assert self.requests.pop(effect.request_id).instance_id is None, f"{effect}: it was dispatched"
                assert effect.retry_after_s > 0.0
                self.rejected.append(effect.request_id)
            case StartMigration():
                check_choice(effect.choice, effect.target_id)
                self._start(effect)
            case SendMessage():
                assert effect.sender_id in self.draining, f"{effect}: the sender is gone"
                self.flying.append(effect)
            case AssignTerms():
                assert effect.instance_id in self.draining, f"{effect}: the instance is gone"
                most = self.kind_of(effect.instance_id).most_tokens
                budget = effect.terms.budget_tokens
                assert budget is None or self.capacity.max_num_seqs <= budget <= most, f"{effect}: no such budget"
            case PublishLayout() | AdviseScale():
                pass

    def _start(self, effect: StartMigration) -> None:
        request = self.requests[effect.request_id]
        assert effect.migration_id not in self._ids_used, f"{effect}: the id was used before"
        assert request.instance_id == effect.source_id, f"{effect}: it is on {request.instance_id}"
        assert request.running or request.parked, f"{effect}: it waits"
        assert request.parked or not request.armed, f"{effect}: its prompt is not computed"
        assert request.pin_reason is None, f"{effect}: it is pinned"
        assert request.migration_id is None, f"{effect}: it is under way already"
        assert effect.source_id != effect.target_id, f"{effect}: to itself"
        assert self.draining.get(effect.target_id) is False, f"{effect}: the target takes no requests"
        assert self.could_hold(effect.target_id, request), f"{effect}: it does not fit there"
        self._ids_used.add(effect.migration_id)
        self.moves[effect.migration_id] = effect
        request.migration_id = effect.migration_id
        for instance_id in (effect.source_id, effect.target_id):
            others = [move for move in self.moves.values() if move.reason is not MigrationReason.PREFILLED]
            busy = sum(instance_id in {move.source_id, move.target_id} for move in others)
            assert busy <= self.max_migrations, f"{effect}: {busy} migrations at {instance_id}"

    def _check_answers(self, effect: Effect, instance_id: InstanceId) -> None:
        """Nothing goes to an instance that does not answer while another one does."""
        assert instance_id not in self.suspects or not self.trusted_instances(), f"{effect}: that does not answer"

    def _displace(self, request: WorldRequest) -> None:
        request.instance_id = None
        request.running = request.armed = request.parked = False
        request.migration_id = None

    def _check_placed(self) -> None:
        """While somebody takes requests and could hold it, every request has a place."""
        takers = self.trusted_instances() or self.open_instances()
        if takers and not self.may_hold_back:
            homeless = [request for request in self.requests.values() if request.instance_id is None]
            stuck = [r.request_id for r in homeless if any(self.could_hold(instance_id, r) for instance_id in takers)]
            assert not stuck, f"no place for {stuck}"


def check_choice(choice: Choice | None, chosen_id: InstanceId) -> None:
    """What an effect says of its reasons: always something, and by its own scores the chosen one is the best."""
    assert choice is not None, f"nothing says why {chosen_id}"
    if choice.measure is None:
        assert not choice.scored
        return
    scores = [candidate.score for candidate in choice.scored]
    assert choice.scored[0].instance_id == chosen_id
    assert scores == sorted(scores, reverse=choice.measure in HIGHEST_WINS)
    assert len(scores) == min(choice.n_candidates, MOST_SCORED)
    assert len({candidate.instance_id for candidate in choice.scored}) == len(scores)
    assert chosen_id not in {declined.instance_id for declined in choice.declined}
    assert choice.instead_of is None or choice.instead_of.instance_id != chosen_id
