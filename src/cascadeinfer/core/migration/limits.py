"""How long each step of a migration may take, how much a request may grow meanwhile, and when copying ahead pays."""

import math
from dataclasses import dataclass
from typing import Final, Self

ROOM_SLACK_TOKENS: Final = 64
"""Room requested beyond the request's length, because it keeps decoding until it is cut."""
LEASE_MARGIN_S: Final = 3.0
"""A pull must be complete this long before the end of a lease that began when the cut was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLimits:
    """
    How long each step may take, in seconds, and how much a request may grow during the migration.

    Attributes:
        ask_s: Until the target grants or refuses room.
        cut_s: Until the cut takes effect. A request is cut at its next token, so this covers one step of the source.
        resume_s: From sending the cut until the target's first token. Must be below the lease on the source's blocks by
            a safe margin: what is pulled after the lease has expired may be another request's KV cache.
            The same limit holds for a copy of full blocks before the cut, from when the source is asked for them.
        least_pull_s: No pull is attempted if less than this is left of `resume_s` when the cut is heard of.
        room_slack_tokens: Room requested of the target beyond the length at the start.
        precopy: Whether full blocks are copied before the cut where that pays.
    """

    ask_s: float = 2.0
    cut_s: float = 5.0
    resume_s: float = 7.0
    least_pull_s: float = 0.25
    room_slack_tokens: int = ROOM_SLACK_TOKENS
    precopy: bool = False

    @classmethod
    def under_lease(cls, lease_s: float, *, precopy: bool = False) -> Self:
        """The usual limits for engines that pin a cut request's blocks for `lease_s` seconds."""
        return cls(resume_s=lease_s - LEASE_MARGIN_S, precopy=precopy)


STEPS_OF_A_PAUSE: Final = 3
"""The least pause in token times: the cut's step ends, one step begins the pull, one computes the token."""


@dataclass(frozen=True, slots=True)
class PullEstimate:
    """
    What is known of a request's pull before its migration begins.

    Attributes:
        pull_s: Seconds that pulling its whole KV cache takes; None if nothing is known of the link.
        token_s: Seconds between two of its tokens; 0.0 if not known.
    """

    pull_s: float | None = None
    token_s: float = 0.0

    @property
    def pays_to_copy(self) -> bool:
        """
        Whether copying ahead shortens the pause: it cannot remove the steps that a pause has anyway, so the pull must
        outlast them. A link that is not known yet is tried.
        """
        return self.pull_s is None or self.pull_s > STEPS_OF_A_PAUSE * self.token_s

    @property
    def tokens_meanwhile(self) -> int:
        """Tokens that the request gets while it is copied; 0 where that is not known."""
        return 0 if self.pull_s is None or self.token_s <= 0.0 else math.ceil(self.pull_s / self.token_s)
