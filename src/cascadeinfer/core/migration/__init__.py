"""
The migration protocol: a transition table (`table.py`) with its limits (`limits.py`) and reasons, and a migration in
progress (`progress.py`).

A migration asks for room, copies what it can ahead, cuts the request, transfers its KV cache, resumes it and is done.
It can back out at every step.

Theory of operation. The request decodes on the source until the cut, and nothing is given up before the target has
reserved room (ASKING). The cut (CUTTING) ends the request at its next token, with its KV cache pinned under a lease.
The target then pulls and decodes (RESUMING), and its first token ends the migration. Until then the source's copy stays
pinned. If the lease is about to expire, what the target has pulled can no longer be trusted, and the source takes the
request back (RETURNING). If the source dies, the target recomputes the KV cache (RECOMPUTING). If the target is lost
during the cut, the source takes the request back as well (WITHDRAWING, RETURNING).

The lease begins when the cut takes effect, which the shell may hear of late. It does know when it *sent* the cut, and
that is never later, so the deadline of the pull is counted from there (`Migration.deadline_s`). A first token received
by then was computed from blocks that were still pinned, whatever else was late. A later token is discarded.

Where the pull would make the pause longer than it must be (`PullEstimate`), the target first pulls the full blocks,
which never change, while the request decodes on (COPYING). The source pins them for this, under a lease that begins
when it is asked or later, so the deadline of this copy is counted from there as well. Only the rest is pulled after the
cut. A copy that fails costs nothing: all is pulled then. One that does not end in time ends the migration, because a
pull during the pause would take as long.

A request that is parked with its first token (`core/parking.py`) has been cut already. Its migration begins in PARKED
and differs in nothing else; the lease is renewed when it begins, and its deadline is counted from there.

All decisions are made here: what follows what (`TRANSITIONS`), how long each state may last and how much room is
requested (`MigrationLimits`), whether copying ahead pays (`PullEstimate`), and which reason the record gives
(`Migration.detail`). The reasons for refusals are in `core/refusals.py`. Both shells (simulator and runtime) report to
a `Migration` what has happened and carry out its actions; a test walks the table and feeds every path to both.
`docs/protocols/migration.md` is generated from these modules (`python docs/protocols/draw.py`), and a test keeps the
two in step.
"""

from cascadeinfer.core.migration.limits import LEASE_MARGIN_S, ROOM_SLACK_TOKENS, MigrationLimits, PullEstimate
from cascadeinfer.core.migration.progress import Migration, NotBegun, not_begun
from cascadeinfer.core.migration.table import IGNORED, OUTCOMES, TRANSITIONS, Action, Happening, State, explains

__all__ = [
    "IGNORED",
    "LEASE_MARGIN_S",
    "OUTCOMES",
    "ROOM_SLACK_TOKENS",
    "TRANSITIONS",
    "Action",
    "Happening",
    "Migration",
    "MigrationLimits",
    "NotBegun",
    "PullEstimate",
    "State",
    "explains",
    "not_begun",
]
