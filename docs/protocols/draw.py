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
*awarded*, and when the bidder *accepts* the [migration](migration.md) begins. Nobody sees more than its own instance, the layout, the kinds of its instances and the
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


PAGES: dict[str, Callable[[], str]] = {"migration.md": migration_page, "bidask.md": bidask_page}


def main() -> None:
    """Rewrite every page."""
    for name, make in PAGES.items():
        (HERE / name).write_text(make())


if __name__ == "__main__":
    main()
