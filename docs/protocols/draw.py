"""
Draws the protocols' documentation from their tables: `python docs/protocols/draw.py` rewrites the pages beside this file.

A page is what is written here plus a state diagram (Mermaid) and a table of transitions, both made from the code. `PAGES` maps a file
name to the function that makes its text; a test compares each with the file.
"""

from collections.abc import Callable
from pathlib import Path

from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.migration import IGNORED, OUTCOMES, TRANSITIONS, Action, Happening, State

HERE = Path(__file__).parent

MEANINGS = {
    MigrationOutcome.MOVED: "the request decodes on the target, its KV cache was pulled",
    MigrationOutcome.RECOMPUTED: "the request decodes on the target, which computed its KV cache anew",
    MigrationOutcome.STAYED: "the request decodes on the source",
    MigrationOutcome.ENDED: "the request is over: it finished or its client left",
    MigrationOutcome.LOST: "the instance that had it died; it is placed anew like every orphan",
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


PAGES: dict[str, Callable[[], str]] = {"migration.md": migration_page}


def main() -> None:
    """Rewrite every page."""
    for name, make in PAGES.items():
        (HERE / name).write_text(make())


if __name__ == "__main__":
    main()
