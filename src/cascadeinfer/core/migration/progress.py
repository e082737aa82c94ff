"""One migration in progress: its state and the decisions that depend on time and lengths."""

import enum
import math
from dataclasses import dataclass, field, replace
from typing import Self

from cascadeinfer.core.effects import StartMigration
from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome
from cascadeinfer.core.migration.limits import MigrationLimits, PullEstimate
from cascadeinfer.core.migration.table import IGNORED, OUTCOMES, TRANSITIONS, Action, Happening, State, explains
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId


class NotBegun(enum.StrEnum):
    """Why a requested migration ends before its first state. The values become the record's `detail`."""

    STALE = "stale"
    """The request has ended, or a death or another migration has moved it, since the policy decided."""
    SUSPECTED = "suspected"
    """Instances have died under the request, so it is kept where it is."""


def not_begun(effect: StartMigration, why: NotBegun, *, is_live: bool) -> MigrationEnded:
    """The end of a migration that does not begin; `is_live` says whether the request is still running."""
    return effect.ended(MigrationOutcome.STAYED if is_live else MigrationOutcome.ENDED, why.value)


@dataclass(slots=True)
class Migration:
    """
    One migration in progress.

    Attributes:
        effect: The policy's order.
        n_tokens: Sequence length when the migration began.
        limits: Time limits and slack.
        state: The current state.
        estimate: What is known of the pull; None if its full blocks are not to be copied ahead.
        copy_sent_s: When the source was asked for its full blocks, on the shell's clock. Their lease begins then or
            later.
        copied_tokens: Whose KV cache is at the target before the cut.
        cut_sent_s: When the cut was sent, on the shell's clock. The lease on the source's blocks begins then or later.
        detail: The reason for the outcome as far as it is known: the last happening that explains anything, with its
            refusal; empty if everything went as asked. A metric label.
        story: States and happenings so far, for errors and logs.
    """

    effect: StartMigration
    n_tokens: int
    limits: MigrationLimits = field(default_factory=MigrationLimits)
    state: State = State.ASKING
    cut_sent_s: float = math.nan
    estimate: PullEstimate | None = None
    copy_sent_s: float = math.nan
    copied_tokens: int = 0
    detail: str = ""
    story: list[str] = field(default_factory=lambda: [State.ASKING.value])

    @classmethod
    def of_parked(cls, effect: StartMigration, n_tokens: int, limits: MigrationLimits, now_s: float) -> Self:
        """The migration of a request that is parked, whose lease is renewed now."""
        return cls(effect, n_tokens, limits, State.PARKED, now_s, story=[State.PARKED.value])

    @property
    def migration_id(self) -> MigrationId:
        """The migration's id, chosen by the policy."""
        return self.effect.migration_id

    @property
    def request_id(self) -> RequestId:
        """The request that moves."""
        return self.effect.request_id

    @property
    def source_id(self) -> InstanceId:
        """The instance the request is on when the migration begins."""
        return self.effect.source_id

    @property
    def target_id(self) -> InstanceId:
        """The instance the request is to move to."""
        return self.effect.target_id

    @property
    def outcome(self) -> MigrationOutcome | None:
        """How the migration ended, or None while it is in progress."""
        return OUTCOMES.get(self.state)

    @property
    def at_target(self) -> bool:
        """Whether the target has the request."""
        return self.state in {State.RESUMING, State.RECOMPUTING, State.MOVED, State.RECOMPUTED}

    @property
    def room_tokens(self) -> int:
        """Tokens that the target is asked to reserve room for; a request that is copied ahead grows meanwhile."""
        meanwhile = self.estimate.tokens_meanwhile if self.estimate is not None and self.copies_ahead else 0
        return self.n_tokens + self.limits.room_slack_tokens + meanwhile

    @property
    def copies_ahead(self) -> bool:
        """Whether its full blocks are copied before the cut, once there is room."""
        return self.limits.precopy and self.estimate is not None and self.estimate.pays_to_copy

    @property
    def copy_deadline_s(self) -> float:
        """When the copy must be complete, on the clock of the shell that asked for it."""
        return self.copy_sent_s + self.limits.resume_s

    @property
    def deadline_s(self) -> float:
        """When the pull must be complete, on the clock of the shell that sent the cut."""
        return self.cut_sent_s + self.limits.resume_s

    def limit_s(self, now_s: float) -> float | None:
        """Seconds that the state beginning now may last until TIMED_OUT; None for no limit."""
        match self.state:
            case State.ASKING | State.PARKED:
                return self.limits.ask_s
            case State.COPYING:
                return self.limits.resume_s
            case State.CUTTING:
                return self.limits.cut_s
            case State.RESUMING:
                return self.deadline_s - now_s
            case _:
                return None

    def is_overdue(self, now_s: float) -> bool:
        """Whether the deadline of the pull has passed. True even if the timer that would report it is itself late."""
        return self.state is State.RESUMING and now_s >= self.deadline_s

    def has_outgrown_room(self, n_tokens: int) -> bool:
        """Whether a request of this length must not be cut, because its next token would exceed the room requested."""
        return n_tokens + 1 > self.room_tokens

    def room_heard(self) -> Happening:
        """Classify the news that the target has room."""
        return Happening.ROOM_TO_COPY if self.copies_ahead else Happening.ROOM_GRANTED

    def cut_heard(self, now_s: float, n_pinned_tokens: int) -> Happening:
        """Classify the completion of the cut, heard of now, with KV cache pinned for `n_pinned_tokens` tokens."""
        if n_pinned_tokens <= 0:
            return Happening.CUT_EMPTY
        left_s = self.deadline_s - now_s
        return Happening.CUT_DONE if left_s > 0 and left_s >= self.limits.least_pull_s else Happening.CUT_LATE

    def handle(self, happening: Happening, now_s: float, refusal: Refusal | None = None) -> tuple[Action, ...]:
        """
        Make the transition for one happening.

        Args:
            happening: What has happened.
            now_s: When, on the shell's clock.
            refusal: The reason, with ROOM_REFUSED and CUT_REFUSED.

        Returns:
            What to do now, in order.

        Raises:
            InvalidTransition: The table does not allow this happening in this state; nothing has changed.
        """
        key = (self.state, happening)
        if key in IGNORED:
            return ()
        if key not in TRANSITIONS:
            raise InvalidTransition(
                f"migration {self.migration_id} of request {self.request_id}",
                state=self.state.value,
                event=happening.value,
                story=tuple(self.story),
            )
        if explains(*key):
            self.detail = happening.value if refusal is None else f"{happening.value}:{refusal.value}"
        self.state, actions = TRANSITIONS[key]
        self.story += [f"({happening.value})", self.state.value]
        if Action.CUT in actions:
            self.cut_sent_s = now_s
        if Action.COPY in actions:
            self.copy_sent_s = now_s
        return actions

    def ended(self) -> MigrationEnded:
        """The event that reports the end. Call it only once there is an outcome."""
        assert self.outcome is not None, self.story
        return replace(self.effect.ended(self.outcome, self.detail), copied_tokens=self.copied_tokens)
