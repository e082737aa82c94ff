"""
Draws the protocols' documentation from their tables: `python docs/protocols/draw.py` rewrites the pages beside it.

A page consists of the text here plus a state diagram (Mermaid) and a table of transitions, both made from the code.
`PAGES` maps a file name to the function that makes its text; a test compares each with the file.
"""

from collections.abc import Callable
from pathlib import Path

from cascadeinfer.core.bidask.rounds import TRANSITIONS as ROUND_TRANSITIONS
from cascadeinfer.core.bidask.rounds import BidAskSettings, RoundEvent
from cascadeinfer.core.bidask.rounds import State as RoundState
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.migration import (
    IGNORED,
    LEASE_MARGIN_S,
    OUTCOMES,
    TRANSITIONS,
    Action,
    Happening,
    MigrationLimits,
    NotBegun,
    State,
    explains,
)
from cascadeinfer.core.parking import TRANSITIONS as PARKING_TRANSITIONS
from cascadeinfer.core.parking import ParkingLimits, ParkingState
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.runtime import instance_state
from cascadeinfer.runtime.instance_state import ALLOWED, PHASES, Deed

HERE = Path(__file__).parent

MEANINGS = {
    MigrationOutcome.MOVED: "the request decodes on the target, which pulled its KV cache",
    MigrationOutcome.RECOMPUTED: "the request decodes on the target, which recomputed its KV cache",
    MigrationOutcome.STAYED: "the request decodes on the source",
    MigrationOutcome.ENDED: "the request is over: it finished or its client disconnected",
    MigrationOutcome.LOST: (
        "the instance that had it died or does not answer; the request is placed again like any orphan"
    ),
}

REFUSALS = {
    Refusal.NO_SLOT: ("the target", "its batch is full"),
    Refusal.NO_BLOCKS: ("the target", "its KV cache is full"),
    Refusal.TARGET_DOWN: ("the shell", "the target is not up"),
    Refusal.NOT_CONNECTED: ("the shell", "KV cache cannot go from the source to the target"),
    Refusal.UNKNOWN: ("the source", "it has no such request (any more)"),
    Refusal.UNMOVABLE: ("the source", "its engine cannot move requests, or not this one"),
    Refusal.WAITING: (
        "the source",
        "the request does not run: it has been preempted, or its KV cache is still on the way",
    ),
    Refusal.PREFILLING: ("the source", "the request's prompt is not computed yet"),
    Refusal.ALREADY_CUT: ("the source", "the request has been cut"),
    Refusal.ENDING: ("the source", "the next token is the last one"),
    Refusal.OUTGREW_ROOM: ("the shell", "the request has grown past the room asked for"),
    Refusal.MIGRATIONS: ("source or target", "as many migrations as may be are under way there"),
}
NOT_BEGUN = {
    NotBegun.STALE: (
        "the request has ended, or has been moved by a death or another migration, since the policy's last look"
    ),
    NotBegun.SUSPECTED: "instances have died under the request, and it is kept where it is",
}

MIGRATION_INTRO = """\
# The migration protocol

One request moves from its *source* to its *target* instance with its KV cache. The tables below are the whole protocol.
They are in `src/cascadeinfer/core/migration/` and `refusals.py`, and this page is generated from them
(`python docs/protocols/draw.py`). The simulator and the runtime both follow them; a test compares the two path by path.

The request decodes on the source until the cut. By then the target has reserved room, so the source gives nothing up in
vain. If the pull would make the pause longer, the target copies the request's full blocks before the cut
([pre-copy](../migration.md#pre-copy)); the pause then carries the rest. The cut ends the request at its next token and
pins its KV cache under a lease; the target pulls the cache and continues. The target's first token ends the migration.
Whatever goes wrong in between, the request continues where its tokens are safe, or is recomputed from its prompt and
output so far.

A request that is [parked](parking.md) has been cut already. Its migration begins in `parked`, asks for room and goes on
with the pull; until then it may be refused without any harm.
"""
PARKING_INTRO = """\
# Parking

A policy with prefill stages dispatches a prompt with `park`: the instance computes the prompt and the first token and
stops there. The request is then parked, with its KV cache pinned and without a batch slot, until the policy moves it to
the instance that decodes it. That move is an ordinary [migration](migration.md) which has its cut behind it. The table
below is the whole protocol of parking. It is `TRANSITIONS` in `src/cascadeinfer/core/parking.py`, and this page is
generated from it (`python docs/protocols/draw.py`).

The simulator and the server both follow it (`sim/parkings.py`, `runtime/parkings.py`). Before a migration of a parked
request asks for room, the lease on its blocks is renewed. `not_parked` happens in the server only: a request that an
engine ran like any other.
"""
PARKING_NOTES = """\
`left` is any end of the stay: the request has ended (with its first token, too, and then nothing is pinned), its client
has left, or its instance has died; then it is placed anew like all orphans. A request that is preempted before its
first token stays armed. One that has been parked for {park_s:g} s without a target is taken back: it is queued where it
is, recomputed, and decodes there until it is moved like any running request. `move_refused` is a migration that ended
before anything was pulled; after any other end (`move_over`) the request is elsewhere, recomputes, or is over.
"""
BIDASK_INTRO = """\
# The bid-ask protocol

To give a request away, an instance's agent opens a *round*: it *asks* a few instances, those with room *bid*, the best
bid is *awarded*, and when the bidder *accepts*, the [migration](migration.md) begins. An agent sees only its own
instance, the layout with the kinds of its instances, and the messages sent to it. The table below is the whole
protocol. It is `TRANSITIONS` in `src/cascadeinfer/core/bidask/rounds.py`, and this page is generated from it (`python
docs/protocols/draw.py`). `tests/scenarios/` has negotiations as transcripts.

The request keeps decoding at the asker until the migration cuts it, so a full, busy or dead next stage costs only
messages. After a failed round the request rests, twice as long after each failure, and the agent does not ask for the
same reason for a while.
"""
BIDASK_MESSAGES = (
    ("`Ask`", "asker", "will you take this request? with its length, the reason and the asker's load"),
    ("`Bid`", "bidder", "yes: with price, load, free blocks and migrations; the bidder holds the room back"),
    (
        "`Decline`",
        "bidder",
        "no: `busy`, `no_slot`, `no_blocks`, `no_gain`, `draining`, `suspect`, or `expired` after an award",
    ),
    ("`Award`", "asker", "it is yours: keep a place"),
    ("`Accept`", "bidder", "the place is kept: start the migration"),
    ("`Withdraw`", "asker", "forget the bid or the place"),
    ("`Advert`", "any agent", "my load, sent to stage peers now and then; not part of a round"),
)
BIDASK_LOST = (
    ("`Ask`, `Bid` or `Decline`", "one bid less; the round closes when the asker's time is up"),
    (
        "`Award` or `Accept`",
        "the asker withdraws and awards the next best bid; the place is free at the latest when its time is up",
    ),
    ("`Withdraw`", "the place is free when its time is up"),
)
BIDASK_TIMES = """\
An asker waits {s.bid_wait_s:g} s for bids and {s.award_wait_s:g} s for the accept; a bidder holds room back for
{s.offer_life_s:g} s and keeps an awarded place for {s.keep_life_s:g} s, longer than the asker waits, so no migration
starts towards a place that is gone. An instance has at most {s.max_migrations} migrations at once, in both directions
together; kept places and awards under way count."""
MIGRATION_LIMITS = """\
A state with a limit ends with `timed_out`: `asking` after {l.ask_s:g} s, `cutting` after {l.cut_s:g} s. `resuming` ends
{l.resume_s:g} s after the cut was *sent*, which is {margin_s:g} s before a lease of {lease_s:g} s could end
(`--kv-lease-s`); a cut that is heard of with less than {l.least_pull_s:g} s left is `cut_late`. \
`copying` ends as long after
the source was asked for its full blocks, for the same reason. The other states last as long as the instance that has
the request lives and answers.

The target is asked for room for {l.room_slack_tokens} tokens more than the request has at the start, \
because the request
keeps decoding until it is cut, and for as many more as it will get while it is copied. One that outgrows that room
before it is cut stays (`outgrew_room`)."""
DETAIL_INTRO = """\
The record of a migration, its metric and the event that the policy receives give the reason in one word, `detail`: the
last happening that explains anything (the column above), with the refusal behind it, such as `timed_out`,
`target_lost` or `cut_refused:ending`. An answer that grants what was asked explains nothing; neither does an ignored
happening, nor the source's answer to a withdrawal, whose cause is known by then. `detail` is empty for `moved` only."""
NOT_BEGUN_INTRO = """\
A migration that a policy asks for in vain is over before its first state: `ended` if the request has ended, else
`stayed`."""
IGNORED_INTRO = """\
These combinations are legal and change nothing. Anything in neither table is a bug of the caller: it raises
`InvalidTransition` and changes nothing."""

INSTANCE_INTRO = """\
# An instance's life

What the runtime knows of an instance's life is `TRANSITIONS` in `src/cascadeinfer/runtime/instance_state.py`, and this
page is generated from it (`python docs/protocols/draw.py`). `/admin/instances` shows each instance's state and its last
changes.

An instance starts, shakes hands with all instances that are up, and joins them; from then on it is in use. When it
dies, for whatever reason, it is restarted after a while; an instance that dies while it drains is gone.
`tests/runtime/test_instance_life.py` forces each transition on a running runtime and checks what each state allows by
what requests and operators find.
"""
INSTANCE_ALLOWED = """\
What a state allows. *asked*: the instance is asked for its load. *run*: requests run there and may leave by migration,
and the front end's calls reach it. *take*: new requests are placed there, and running ones moved there. *in need*: the
same, while no instance in use answers. *join*: it may join those that are up. *restarted*, *drained*, *removed*: it may
be. *phase* is the word for operators."""
DEEDS = {
    Deed.BE_ASKED: "asked",
    Deed.RUN: "run",
    Deed.TAKE: "take",
    Deed.TAKE_IN_NEED: "in need",
    Deed.JOIN: "join",
    Deed.BE_RESTARTED: "restarted",
    Deed.BE_DRAINED: "drained",
    Deed.BE_REMOVED: "removed",
}
INSTANCE_VIEW = """\
## What the policy knows of it

The table above is the runtime's and is authoritative. A policy knows less, and later: its `ClusterView`
(`core/view.py`) has an entry for each instance in use, made and changed by events that the runtime sends *after* the
state has changed. From the instances that do not drain, the roster (`core/roster.py`) makes the layout in force. It
knows nothing of starts, handshakes and restarts."""
VIEWED = (
    ("up", "a member, available", "`InstanceJoined`, `InstanceTrusted`"),
    ("suspect", "a member, available while no other member is trusted", "`InstanceSuspected`"),
    ("condemned", "what it was before: what is placed there now is an orphan at once", "-"),
    ("draining", "no member: in no stage, and its requests move away", "`InstanceDraining`"),
    ("draining_suspect", "no member, suspect", "`InstanceSuspected`, `InstanceDraining`"),
    ("doomed", "no member", "`InstanceDraining`, unless it drained before"),
    ("all others", "nothing", "`InstanceLost`, with the requests that were there"),
)


def migration_page() -> str:
    """The text of `migration.md`."""
    return "\n".join(
        [
            MIGRATION_INTRO,
            "## States",
            "",
            "```mermaid",
            *_migration_diagram(),
            "```",
            "",
            "Not drawn: `client_left`, which leads from every state to `ended`.",
            "",
            "## Transitions and actions",
            "",
            "Actions are carried out in the order given.",
            "",
            *_table(
                ("state", "what happens", "next state", "actions", "explains"),
                [
                    (
                        state.value,
                        happening.value,
                        following.value,
                        ", ".join(f"`{a.value}`" for a in actions) or "-",
                        "yes" if explains(state, happening) else "-",
                    )
                    for (state, happening), (following, actions) in TRANSITIONS.items()
                ],
            ),
            "",
            "## Without effect",
            "",
            IGNORED_INTRO,
            "",
            *_table(
                ("state", "what happens"),
                sorted((state.value, happening.value) for state, happening in IGNORED),
            ),
            "",
            "## Limits",
            "",
            MIGRATION_LIMITS.format(
                l=MigrationLimits(), margin_s=LEASE_MARGIN_S, lease_s=MigrationLimits().resume_s + LEASE_MARGIN_S
            ),
            "",
            "## Refusals",
            "",
            "The words behind `room_refused` and `cut_refused`, the same on the wire, in records, metrics and logs.",
            "",
            *_table(("word", "who says it", "why"), [(f"`{r.value}`", *REFUSALS[r]) for r in Refusal]),
            "",
            "## Outcomes",
            "",
            *_table(
                ("final state", "outcome of the migration"),
                [(state.value, MEANINGS[outcome]) for state, outcome in OUTCOMES.items()],
            ),
            "",
            "## The record's detail",
            "",
            DETAIL_INTRO,
            "",
            NOT_BEGUN_INTRO,
            "",
            *_table(("detail", "why"), [(f"`{n.value}`", NOT_BEGUN[n]) for n in NotBegun]),
            "",
            f"{len(TRANSITIONS)} transitions, {len(State)} states, {len(Happening)} happenings, {len(Action)} actions.",
            "",
        ]
    )


def bidask_page() -> str:
    """The text of `bidask.md`."""
    return "\n".join(
        [
            BIDASK_INTRO,
            "## States",
            "",
            "```mermaid",
            *_bidask_diagram(),
            "```",
            "",
            (
                "The states from `asking` to `resting` are the asker's view of a round, "
                "those from `offering` to `receiving` a bidder's."
            ),
            "",
            "## Messages",
            "",
            *_table(("message", "from", "says"), list(BIDASK_MESSAGES)),
            "",
            "## Transitions",
            "",
            (
                "Anything not in this table raises `InvalidTransition` and changes nothing. "
                "Late and duplicate messages are sorted"
            ),
            "out before they get here.",
            "",
            *_table(
                ("state", "what happens", "next state"),
                [(state.value, event.value, after.value) for (state, event), after in ROUND_TRANSITIONS.items()],
            ),
            "",
            "## What is lost",
            "",
            *_table(("lost", "then"), list(BIDASK_LOST)),
            "",
            BIDASK_TIMES.format(s=BidAskSettings()),
            "",
            f"{len(ROUND_TRANSITIONS)} transitions, {len(RoundState)} states, {len(RoundEvent)} events.",
            "",
        ]
    )


def instance_page() -> str:
    """The text of `instance.md`."""
    transitions = instance_state.TRANSITIONS
    n_states, n_happenings = len(instance_state.State), len(instance_state.Happening)
    return "\n".join(
        [
            INSTANCE_INTRO,
            "## States",
            "",
            "```mermaid",
            *_instance_diagram(),
            "```",
            "",
            "Not drawn: `drain`, which leads from every state in which nothing runs there to `removing`.",
            "",
            "## What each state allows",
            "",
            INSTANCE_ALLOWED,
            "",
            *_table(
                ("state", "phase", *DEEDS.values()),
                [
                    (state.value, PHASES[state], *("yes" if deed in allowed else "-" for deed in DEEDS))
                    for state, allowed in ALLOWED.items()
                ],
            ),
            "",
            INSTANCE_VIEW,
            "",
            *_table(("state", "in the policy's books", "made so by"), list(VIEWED)),
            "",
            "## Transitions",
            "",
            *_table(
                ("state", "what happens", "next state"),
                [(state.value, happening.value, after.value) for (state, happening), after in transitions.items()],
            ),
            "",
            "## Without effect",
            "",
            IGNORED_INTRO,
            "",
            *_table(
                ("state", "what happens"),
                sorted((state.value, happening.value) for state, happening in instance_state.IGNORED),
            ),
            "",
            f"{len(transitions)} transitions, {n_states} states, {n_happenings} happenings.",
            "",
        ]
    )


def _instance_diagram() -> list[str]:
    labels: dict[tuple[str, str], list[str]] = {}
    for (state, happening), after in instance_state.TRANSITIONS.items():
        if happening is not instance_state.Happening.DRAIN or Deed.RUN in ALLOWED[state]:
            labels.setdefault((state.value, after.value), []).append(happening.value)
    return [
        "stateDiagram-v2",
        f"    [*] --> {instance_state.State.ADDED.value}",
        *(f"    {start} --> {end}: {', '.join(happenings)}" for (start, end), happenings in labels.items()),
        f"    {instance_state.State.GONE.value} --> [*]",
    ]


def _bidask_diagram() -> list[str]:
    labels: dict[tuple[str, str], list[str]] = {}
    for (state, event), after in ROUND_TRANSITIONS.items():
        start = "[*]" if state is RoundState.NEW else state.value
        end = "[*]" if after is RoundState.CLOSED else after.value
        labels.setdefault((start, end), []).append(event.value)
    return [
        "stateDiagram-v2",
        *(f"    {start} --> {end}: {', '.join(events)}" for (start, end), events in labels.items()),
    ]


def parking_page() -> str:
    """The text of `parking.md`."""
    labels: dict[tuple[str, str], list[str]] = {}
    for (state, event), (following, _) in PARKING_TRANSITIONS.items():
        labels.setdefault((state.value, following.value), []).append(event.value)
    return "\n".join(
        [
            PARKING_INTRO,
            "## States",
            "",
            "```mermaid",
            "stateDiagram-v2",
            f"    [*] --> {ParkingState.PREFILLING.value}: dispatch with park",
            *(f"    {state} --> {following}: {', '.join(events)}" for (state, following), events in labels.items()),
            f"    {ParkingState.OVER.value} --> [*]",
            "```",
            "",
            "## Transitions and actions",
            "",
            *_table(
                ("state", "what happens", "next state", "actions"),
                [
                    (
                        state.value,
                        event.value,
                        following.value,
                        ", ".join(f"`{action.value}`" for action in actions) or "-",
                    )
                    for (state, event), (following, actions) in PARKING_TRANSITIONS.items()
                ],
            ),
            "",
            PARKING_NOTES.format(park_s=ParkingLimits().park_s),
        ]
    )


def _migration_diagram() -> list[str]:
    lines = ["stateDiagram-v2", *(f"    [*] --> {state.value}: ask_room" for state in (State.ASKING, State.PARKED))]
    labels: dict[tuple[str, str], list[str]] = {}
    for (state, happening), (following, _) in TRANSITIONS.items():
        if happening is not Happening.CLIENT_LEFT:
            labels.setdefault((state.value, following.value), []).append(happening.value)
    lines += [
        f"    {state} --> {following}: {', '.join(happenings)}" for (state, following), happenings in labels.items()
    ]
    lines += [f"    {state.value} --> [*]" for state in OUTCOMES]
    return lines


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


PAGES: dict[str, Callable[[], str]] = {
    "migration.md": migration_page,
    "bidask.md": bidask_page,
    "instance.md": instance_page,
    "parking.md": parking_page,
}


def main() -> None:
    """Rewrite every page."""
    for name, make in PAGES.items():
        (HERE / name).write_text(make())


if __name__ == "__main__":
    main()
