"""
Draws the protocols' documentation from their tables: `python docs/protocols/draw.py` rewrites the pages beside this file.

A page is what is written here plus a state diagram (Mermaid) and a table of transitions, both made from the code. `PAGES` maps a file
name to the function that makes its text; a test compares each with the file.
"""

from collections.abc import Callable
from pathlib import Path

from cascadeinfer.core.bidask.rounds import TRANSITIONS as ROUND_TRANSITIONS
from cascadeinfer.core.bidask.rounds import BidAskSettings, RoundEvent
from cascadeinfer.core.bidask.rounds import State as RoundState
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.migration import IGNORED, OUTCOMES, TRANSITIONS, Action, Happening, State
from cascadeinfer.runtime import instance_state
from cascadeinfer.runtime.instance_state import ALLOWED, PHASES, Deed

HERE = Path(__file__).parent

MEANINGS = {
    MigrationOutcome.MOVED: "the request decodes on the target, its KV cache was pulled",
    MigrationOutcome.RECOMPUTED: "the request decodes on the target, which computed its KV cache anew",
    MigrationOutcome.STAYED: "the request decodes on the source",
    MigrationOutcome.ENDED: "the request is over: it finished or its client left",
    MigrationOutcome.LOST: "the instance that had it died, or does not answer; it is placed anew like every orphan",
}

MIGRATION_INTRO = """\
# The migration protocol

One request moves from its *source* to its *target* instance with its KV cache. The table below is the whole protocol: it is
`TRANSITIONS` in `src/cascadeinfer/core/migration.py`, and this page is drawn from it (`python docs/protocols/draw.py`).
The simulator and the runtime both follow it.

The request decodes on the source until the cut. The target has reserved room by then, so nothing is given up in vain. The cut
ends the request at its next token and pins its KV cache under a lease; the target pulls it and goes on. The target's first token
ends the migration. Whatever goes wrong on the way, the request goes on where its tokens are safe, or is computed anew from prompt and
output so far.
"""
BIDASK_INTRO = """\
# The bid-ask protocol

An instance that has a request to give away finds a taker by itself: it *asks* a few instances, those with room *bid*, the best bid is
*awarded*, and when the bidder *accepts* the [migration](migration.md) begins. Nobody sees more than its own instance, the layout and the
messages sent to it. The table below is the whole protocol: it is `TRANSITIONS` in `src/cascadeinfer/core/bidask/rounds.py`, and this
page is drawn from it (`python docs/protocols/draw.py`). `tests/scenarios/` has it in written conversations.

The request decodes on at the asker until the migration cuts it: a full, busy or dead next stage costs it nothing. A round that came to
nothing makes the request rest, twice as long after each failure, and the asker asks nobody for the same reason for a while.
"""
BIDASK_MESSAGES = (
    ("`Ask`", "asker", "will you take this request? names its length, the reason and the asker's load"),
    ("`Bid`", "bidder", "yes: price and load, free blocks, migrations; its room is held back"),
    (
        "`Decline`",
        "bidder",
        "no: `busy`, `no_slot`, `no_blocks`, `no_gain`, `draining`, `suspect`, or after an award `expired`",
    ),
    ("`Award`", "asker", "you have it: keep a place"),
    ("`Accept`", "bidder", "the place is kept: start the migration"),
    ("`Withdraw`", "asker", "forget the bid or the place"),
    ("`Advert`", "anybody", "my load, to stage peers now and then; no part of a round"),
)
BIDASK_LOST = (
    ("`Ask`, `Bid` or `Decline`", "a bid less; the round closes when the asker's time is up"),
    (
        "`Award` or `Accept`",
        "the asker withdraws and awards the next best bid; the place falls free at the latest when its time is up",
    ),
    ("`Withdraw`", "the place falls free when its time is up"),
)
BIDASK_TIMES = """\
An asker waits {s.bid_wait_s:g} s for bids and {s.award_wait_s:g} s for the accept; a bidder holds room back for {s.offer_life_s:g} s and
keeps an awarded place for {s.keep_life_s:g} s, longer than the asker waits, so no migration starts to a place that is gone. At most
{s.max_migrations} migrations at once per instance, both directions together; kept places and awards under way count."""
IGNORED_INTRO = """\
Legal, and nothing changes. Everything that is in neither table is a bug of the caller: it raises `InvalidTransition` and changes
nothing."""

INSTANCE_INTRO = """\
# An instance's life

What the runtime knows of where an instance is: it is `TRANSITIONS` in `src/cascadeinfer/runtime/instance_state.py`, and this page is drawn from it
(`python docs/protocols/draw.py`). `/admin/instances` shows the state of each and the last passages that led to it.

An instance is started, shakes hands with all that are up, and joins them. It is in use from then on. Its death, whatever the cause, leads to a restart
after a while; that of one that drains is its end. `tests/runtime/test_instance_life.py` forces each transition on a running runtime, and checks
what each state allows by what requests and operators find.
"""
INSTANCE_ALLOWED = """\
What may be done with an instance: it is *asked* for its load; *run*: requests run there, leave it by
migration, and the front end's calls reach it; *take*: new requests are placed there and running ones moved there; *in need*: the same when no instance in
use answers; *join* those that are up; be *restarted*, *drained*, *removed*. *Phase* is the word for operators."""
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

Two views of one thing. This table is the runtime's, and the truth. A policy knows less, later: its books (`ClusterView` in `core/view.py`) have an entry for each
instance in use, made and changed by events that the runtime sends *after* the state has changed. From those that do not drain the roster (`core/roster.py`)
makes the layout in force: who serves which stage. It knows nothing of starts, handshakes and restarts."""
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
                ("state", "what happens", "next state", "actions"),
                [
                    (state.value, happening.value, following.value, ", ".join(f"`{a.value}`" for a in actions) or "-")
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
            "## Outcomes",
            "",
            *_table(
                ("final state", "outcome of the migration"),
                [(state.value, MEANINGS[outcome]) for state, outcome in OUTCOMES.items()],
            ),
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
            "The left side is the asker's view of a round, the right side a bidder's.",
            "",
            "## Messages",
            "",
            *_table(("message", "from", "says"), list(BIDASK_MESSAGES)),
            "",
            "## Transitions",
            "",
            "Everything that is not in this table raises `InvalidTransition` and changes nothing; late and doubled messages are told apart",
            "before they get here.",
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


def _migration_diagram() -> list[str]:
    lines = ["stateDiagram-v2", f"    [*] --> {State.ASKING.value}: ask_room"]
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
}


def main() -> None:
    """Rewrite every page."""
    for name, make in PAGES.items():
        (HERE / name).write_text(make())


if __name__ == "__main__":
    main()
