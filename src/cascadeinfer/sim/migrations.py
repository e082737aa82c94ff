"""
Carries migrations out between simulated instances, following the state machine in `core/migration/`.

Times: the ask, its answer and the cut command take `control_s` each. A copy of full blocks before the cut takes three
more (the source is asked, the target told, and answers) and a transfer, beside which the request decodes. The cut takes
effect when the source's step in flight ends; until then the source keeps decoding. The pull starts `control_s +
pull_overhead_s` later and moves all tokens but the last (less what the target has cached) over the network; the
source's blocks stay pinned until it is done. The request joins the target's next step after the one in flight, and that
step's token ends the migration. A crashed instance does not answer: the time limit of the state, or the detection of
the crash, decides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, assert_never

from cascadeinfer.core.effects import StartMigration
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome
from cascadeinfer.core.migration import Action, Happening, Migration, PullEstimate, State
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId
from cascadeinfer.sim.instance import SimInstance
from cascadeinfer.sim.kernel import Kernel, Priority
from cascadeinfer.sim.network import Network
from cascadeinfer.sim.requests import Phase, SimRequest
from cascadeinfer.sim.settings import SimConfig

ASKS: Final = frozenset({State.ASKING, State.PARKED})
"""The states in which the target is asked for room."""


@dataclass(slots=True, eq=False)
class Move:
    """
    One migration and what is known of it.

    Attributes:
        started_s: When the policy asked for it; then when the cut took effect (or it was parked), and when it was over.
        resumed_s: When the target was told to pull.
        tokens: Sequence length at the cut.
        pulled_tokens: That went over the network after the cut.
        copy_began_s, copy_s: When the copy before the cut began, and how long it took, its commands included.
        preemptions: Of the request, when its full blocks were copied; later ones leave it with other blocks.
    """

    migration: Migration
    request: SimRequest
    started_s: float
    cut_s: float = math.nan
    resumed_s: float = math.nan
    ended_s: float = math.nan
    tokens: int = 0
    pulled_tokens: int = 0
    copy_began_s: float = math.nan
    copy_s: float = 0.0
    preemptions: int = 0

    def ended(self, *, measures: bool) -> MigrationEnded:
        """The event that reports the end; `measures`: with what its pull tells of the link."""
        ended = self.migration.ended()
        if not measures or ended.outcome is not MigrationOutcome.MOVED:
            return ended
        pull_s = self.copy_s if ended.copied_tokens else self.ended_s - self.resumed_s
        return replace(ended, pulled_tokens=self.pulled_tokens + ended.copied_tokens, pull_s=pull_s)


class Host(Protocol):
    """The cluster, as the migrator needs it."""

    def instance(self, instance_id: InstanceId) -> SimInstance | None:
        """An instance brought up to now, crashed ones included until that is found out; None when it is gone."""
        ...

    def touched(self, instance: SimInstance) -> None:
        """Something changed there: its wake-up may be another."""
        ...

    def displaced(self, request: SimRequest) -> None:
        """The request is on no instance; an event will tell the policy."""
        ...

    def migration_ended(self, move: Move) -> None:
        """A migration is over."""
        ...


class Migrator:
    """All migrations under way."""

    def __init__(self, host: Host, kernel: Kernel, config: SimConfig) -> None:
        self._host = host
        self._kernel = kernel
        self._config = config
        self.network = Network(kernel, config.network.rate_of, config.network.max_pulls)
        self.moves: dict[MigrationId, Move] = {}
        self._of_request: dict[RequestId, Move] = {}

    def move_of(self, request: SimRequest) -> Move | None:
        """The migration that a request takes part in."""
        return self._of_request.get(request.request_id)

    def involves(self, instance_id: InstanceId) -> bool:
        """Whether an instance has a part in any migration."""
        return any(instance_id in {m.migration.source_id, m.migration.target_id} for m in self.moves.values())

    def start(self, effect: StartMigration, request: SimRequest, length_tokens: int) -> None:
        """Begin; the request must be on the effect's source and in no migration."""
        estimate = self._estimate(effect, request, length_tokens) if self._config.migration.precopy else None
        migration = Migration(effect, length_tokens, self._config.migration, estimate=estimate)
        self._begin(Move(migration, request, self._kernel.now_s))

    def _estimate(self, effect: StartMigration, request: SimRequest, length_tokens: int) -> PullEstimate:
        """From the settings, and from the request's mean time between tokens, as the runtime measures it."""
        network = self._config.network
        rate = network.rate_of(effect.source_id, effect.target_id)
        pull_s = network.pull_overhead_s + length_tokens * self._config.kv_bytes_per_token / rate
        n_gaps = length_tokens - request.prompt_tokens - 1
        return PullEstimate(pull_s, (self._kernel.now_s - request.first_token_s) / n_gaps if n_gaps > 0 else 0.0)

    def start_parked(self, effect: StartMigration, request: SimRequest, parked_s: float) -> None:
        """Begin with a request that has been parked on the effect's source since then."""
        now_s, tokens = self._kernel.now_s, request.settled_tokens
        migration = Migration.of_parked(effect, tokens, self._config.migration, now_s)
        self._begin(Move(migration, request, now_s, cut_s=parked_s, tokens=tokens))

    def _begin(self, move: Move) -> None:
        effect = move.migration.effect
        self.moves[effect.migration_id] = move
        self._of_request[effect.request_id] = move
        self._limit(move)
        self._act(move, Action.ASK_ROOM)

    def happen(self, move: Move, happening: Happening, refusal: Refusal | None = None) -> None:
        """Something happened to a migration; ignored when it is over."""
        migration = move.migration
        if migration.migration_id not in self.moves:
            return
        before = migration.state
        for action in migration.handle(happening, self._kernel.now_s, refusal):
            self._act(move, action)
        if migration.outcome is not None:
            self._end(move, migration.outcome)
        elif migration.state is not before:
            self._limit(move)

    def _end(self, move: Move, outcome: MigrationOutcome) -> None:
        del self.moves[move.migration.migration_id]
        del self._of_request[move.request.request_id]
        move.ended_s = self._kernel.now_s
        if outcome in {MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED}:
            move.request.migrations += 1
        elif outcome is MigrationOutcome.LOST:
            self._displace(move.request)
        self._host.migration_ended(move)

    def first_token(self, request: SimRequest) -> None:
        """The instance that has a watched request sent its next token."""
        move = self._of_request.get(request.request_id)
        if move is not None:
            self.happen(move, Happening.FIRST_TOKEN)

    def cut_took_effect(self, request: SimRequest) -> None:
        """A request left its batch with its KV cache pinned."""
        move = self._of_request[request.request_id]
        move.cut_s = self._kernel.now_s
        move.tokens = request.settled_tokens
        self.happen(move, move.migration.cut_heard(self._kernel.now_s, move.tokens - 1))

    def instance_crashed(self, instance_id: InstanceId) -> None:
        """Transfers from and to it stop; the cause is not known yet."""
        for move in list(self.moves.values()):
            if instance_id in {move.migration.source_id, move.migration.target_id}:
                self.network.cancel(move.migration.migration_id)

    def instance_lost(self, instance_id: InstanceId) -> None:
        """A crash has been found out: tell every migration that the instance has a part in."""
        for move in list(self.moves.values()):
            if move.migration.source_id == instance_id:
                self.happen(move, Happening.SOURCE_LOST)
            elif move.migration.target_id == instance_id:
                self.happen(move, Happening.TARGET_LOST)

    def _limit(self, move: Move) -> None:
        limit_s = move.migration.limit_s(self._kernel.now_s)
        if limit_s is not None:
            self._after(limit_s, self._timed_out, (move, move.migration.state))

    def _timed_out(self, what: tuple[Move, State]) -> None:
        move, state = what
        if move.migration.state is state:
            self.happen(move, Happening.TIMED_OUT)

    def _after(self, delay_s: float, action: Callable[[Any], None], argument: Any) -> None:
        self._kernel.at(self._kernel.now_s + delay_s, Priority.CONTROL, action, argument)

    def _act(self, move: Move, action: Action) -> None:  # noqa: C901, PLR0912 - one arm per action of the table
        control_s = self._config.network.control_s
        match action:
            case Action.ASK_ROOM:
                self._after(control_s, self._ask_room, move)
            case Action.COPY:
                move.copy_began_s = self._kernel.now_s
                self._after(control_s, self._copy, move)
            case Action.RELEASE_COPY:  # full blocks are not pinned here; who has lost them by the cut, copies in vain
                self.network.cancel(move.migration.migration_id)
            case Action.CUT:
                self._after(control_s, self._cut, move)
            case Action.UNDO_CUT:
                self._after(control_s, self._undo_cut, move)
            case Action.RESUME:
                move.resumed_s = self._kernel.now_s
                self._resume(move)
            case Action.RECOMPUTE:
                self._place(move, move.migration.target_id)
            case Action.TAKE_BACK:
                self._place(move, move.migration.source_id)
            case Action.RELEASE_ROOM:
                if (target := self._host.instance(move.migration.target_id)) is not None:
                    target.unreserve(move.migration.migration_id, self._kernel.now_s)
                    self._host.touched(target)
            case Action.RELEASE_PIN:
                self._unpin(move)
            case Action.ABORT_AT_SOURCE:
                self._displace(move.request)
            case Action.ABORT_AT_TARGET:
                self.network.cancel(move.migration.migration_id)
                self._displace(move.request)
            case _:
                assert_never(action)

    def _ask_room(self, move: Move) -> None:
        target = self._host.instance(move.migration.target_id)
        if move.migration.state not in ASKS:
            return
        if target is None:
            self._answer(move, Refusal.TARGET_DOWN)
        elif target.alive:
            migration = move.migration
            refused = target.reserve(migration.migration_id, migration.room_tokens, self._kernel.now_s)
            self._host.touched(target)
            self._after(self._config.network.control_s, self._answered, (move, refused))

    def _answered(self, what: tuple[Move, Refusal | None]) -> None:
        move, refused = what
        if move.migration.state in ASKS:
            self._answer(move, refused)

    def _answer(self, move: Move, refused: Refusal | None) -> None:
        self.happen(move, move.migration.room_heard() if refused is None else Happening.ROOM_REFUSED, refused)

    def _copy(self, move: Move) -> None:
        source = self._host.instance(move.migration.source_id)
        if move.migration.state is not State.COPYING or source is None or not source.alive:
            return
        tokens, network = source.full_block_tokens(move.request), self._config.network
        if tokens == 0:
            self._after(network.control_s, self._not_copied, move)
            return
        move.preemptions = move.request.preemptions
        self._after(2 * network.control_s + network.pull_overhead_s, self._transfer_ahead, (move, tokens))

    def _not_copied(self, move: Move) -> None:
        if move.migration.state is State.COPYING:
            self.happen(move, Happening.NOT_COPIED)

    def _transfer_ahead(self, what: tuple[Move, int]) -> None:
        move, tokens = what
        migration = move.migration
        target = self._host.instance(migration.target_id)
        if migration.state is not State.COPYING or target is None or not target.alive:
            return
        n_bytes = tokens * self._config.kv_bytes_per_token

        def copied(_: MigrationId) -> None:
            self._after(self._config.network.control_s, self._copied, what)

        self.network.start(migration.migration_id, migration.source_id, migration.target_id, n_bytes, copied)

    def _copied(self, what: tuple[Move, int]) -> None:
        move, tokens = what
        if move.migration.state is not State.COPYING:
            return
        move.copy_s = self._kernel.now_s - move.copy_began_s
        move.migration.copied_tokens = tokens
        self.happen(move, Happening.COPIED)

    def _cut(self, move: Move) -> None:
        source = self._host.instance(move.migration.source_id)
        if move.migration.state is not State.CUTTING or source is None or not source.alive:
            return
        if move.migration.has_outgrown_room(source.scheduler.length_of(move.request)):
            refused: Refusal | None = Refusal.OUTGREW_ROOM
        else:
            refused = source.request_cut(move.request, self._kernel.now_s)
            self._host.touched(source)
        if refused is not None:
            self.happen(move, Happening.CUT_REFUSED, refused)

    def _undo_cut(self, move: Move) -> None:
        source = self._host.instance(move.migration.source_id)
        if move.migration.state is State.WITHDRAWING and source is not None and source.alive:
            # Either the cut is taken back now, or it never reached the source; one that took effect changed the state.
            source.undo_cut(move.request)
            self.happen(move, Happening.CUT_UNDONE)

    def _resume(self, move: Move) -> None:
        if move.request.phase is Phase.PARKED:
            source = self._host.instance(move.migration.source_id)
            assert source is not None  # its loss would have ended the migration
            source.scheduler.unpark(move.request)
        move.request.instance_id = move.migration.target_id
        target = self._host.instance(move.migration.target_id)
        if target is None:
            return  # its loss arrives as a separate event
        if move.request.preemptions != move.preemptions:
            move.migration.copied_tokens = 0
        missing = target.expect(move.request, move.migration.migration_id, self._kernel.now_s)
        move.pulled_tokens = min(missing, move.tokens - 1 - move.migration.copied_tokens)
        self._host.touched(target)
        network = self._config.network
        self._after(network.control_s + network.pull_overhead_s, self._pull, move)

    def _pull(self, move: Move) -> None:
        source = self._host.instance(move.migration.source_id)
        target = self._host.instance(move.migration.target_id)
        if move.migration.state is not State.RESUMING or source is None or target is None:
            return
        if source.alive and target.alive:
            migration = move.migration
            n_bytes = move.pulled_tokens * self._config.kv_bytes_per_token
            self.network.start(migration.migration_id, migration.source_id, migration.target_id, n_bytes, self._pulled)

    def _pulled(self, migration_id: MigrationId) -> None:
        move = self.moves[migration_id]
        self._unpin(move)
        target = self._host.instance(move.migration.target_id)
        assert target is not None  # a lost target cancels the transfer
        target.watch(move.request)
        target.resume(move.request, self._kernel.now_s)
        self._host.touched(target)

    def _unpin(self, move: Move) -> None:
        source = self._host.instance(move.migration.source_id)
        if source is not None:
            source.unpin(move.request.request_id, self._kernel.now_s)
            self._host.touched(source)

    def _place(self, move: Move, instance_id: InstanceId) -> None:
        """Queue the request at an instance that recomputes its KV cache."""
        move.request.instance_id = instance_id
        instance = self._host.instance(instance_id)
        if instance is None:
            return  # its loss arrives as a separate event
        instance.watch(move.request)
        instance.push(move.request, self._kernel.now_s)
        self._host.touched(instance)

    def _displace(self, request: SimRequest) -> None:
        """Take the request out of whatever instance it is on."""
        instance = self._host.instance(request.instance_id) if request.instance_id is not None else None
        if instance is not None:
            instance.remove(request, self._kernel.now_s)
            self._host.touched(instance)
        self._host.displaced(request)
