"""
The terminal view of `cascadeinfer top`: a picture of the server (`runtime/picture.py`) as text; pure.

A lane is the log axis of lengths in cells: a dot where the instance's stage is, a bar per request, higher for several,
yellow outside the stage. Where the terminal has too few lines, lanes are left out, those without trouble first, and
their number is shown.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SHORTEST_TOKENS: Final = 16
FIXED_CELLS: Final = 72
"""Cells of a line beside the lane and the note."""
LANE_CELLS: Final = (12, 96)
HEIGHTS: Final = "▂▄▆█"
"""Of one, two, three, and more requests in a cell."""
MOVES_SHOWN: Final = 4
OTHER_LINES: Final = 12
"""Lines of the view beside the lanes and the moves that ended."""


def render(
    picture: dict[str, Any], before: dict[str, Any] | None, width: int, height: int | None = None
) -> RenderableType:
    """
    The whole view.

    Args:
        picture: What the server has sent.
        before: The picture before it, for rates; None for the first.
        width: Cells per line.
        height: Lines of the terminal; None for as many as it takes.
    """
    ended = picture["moves"]["ended"][:MOVES_SHOWN]
    instances = sorted(picture["instances"], key=_place)
    n_shown = len(instances) if height is None else max(1, height - OTHER_LINES - len(ended))
    shown = sorted(sorted(instances, key=lambda i: not _trouble(i))[:n_shown], key=_place)
    left_out = len(instances) - len(shown)
    return Group(
        *_head(picture, before, width),
        Text(),
        _lanes(picture, shown, width),
        *([Text(f"and {left_out} more instances; the window is too low", style="dim")] if left_out > 0 else []),
        Text(),
        *_plan(picture, width),
        *(_line(_ended(move), width) for move in ended),
        *(_line(_recent(move), width, "green") for move in picture["moves"]["recent"][-MOVES_SHOWN:]),
    )


def _place(instance: dict[str, Any]) -> tuple[bool, int, int, str]:
    """Sort key: by stage, those without one last."""
    stage, name = instance["stage"], instance["id"]
    return stage is None, stage or 0, len(name), name


def _trouble(instance: dict[str, Any]) -> str:
    """The colour of what deserves a look; empty for an instance that is simply up."""
    if not instance["up"]:
        return "red"
    return "yellow" if instance["drain"] or instance["suspect"] else ""


def _line(text: str, width: int, style: str = "") -> Text:
    line = Text(text, style=style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def _head(picture: dict[str, Any], before: dict[str, Any] | None, width: int) -> list[Text]:
    service, requests, instances = picture["service"], picture["requests"], picture["instances"]
    up = sum(instance["up"] for instance in instances)
    running = sum(instance["running"] for instance in instances)
    return [
        _line(
            f"{service['model']}  {service['policy']}  CascadeInfer {service['version']}  up for "
            f"{lasting(picture['uptime_s'])}",
            width,
            "bold",
        ),
        _line(
            f"{up} of {len(instances)} instances up, {requests['live']} live requests, {running} running, "
            f"{requests['unplaced']} waiting in front, {_refused(picture, before)} refused/s, "
            f"{len(picture['moves']['under_way'])} moving",
            width,
            "" if up == len(instances) else "red",
        ),
    ]


def _refused(picture: dict[str, Any], before: dict[str, Any] | None) -> str:
    if before is None or picture["now_s"] <= before["now_s"]:
        return "-"
    now, then = (p["requests"]["ended"].get("rejected", 0) for p in (picture, before))
    return f"{max(0, now - then) / (picture['now_s'] - before['now_s']):.1f}"


def _lanes(picture: dict[str, Any], instances: Sequence[dict[str, Any]], width: int) -> Table:
    n_cells = min(max(width - FIXED_CELLS, LANE_CELLS[0]), LANE_CELLS[1])
    longest = picture["service"]["max_tokens"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=True, header_style="dim")
    for name in ("inst.", "phase", "st."):
        table.add_column(name, no_wrap=True)
    table.add_column(_axis(n_cells, longest), no_wrap=True, width=n_cells)
    for name in ("KV", "run", "wait", "pins", "res."):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for i in instances:
        trouble = _trouble(i)
        table.add_row(
            i["id"],
            Text("silent" if i["suspect"] else i["phase"], style=trouble),
            "" if i["stage"] is None else str(i["stage"]),
            _lane(i, picture["stages"], n_cells, longest),
            Text(f"{i['kv_usage']:.0%}", style="yellow" if i["kv_usage"] > 0.9 else ""),
            *(
                Text(str(i[name]), style="" if i[name] else "dim")
                for name in ("running", "waiting", "pinned", "reserved")
            ),
            Text(_note(i), style=trouble or "dim"),
        )
    return table


def cell_of(tokens: int, n_cells: int, longest_tokens: int) -> int:
    """The cell of a length on the log axis, 0 to `n_cells - 1`."""
    span = math.log2(max(longest_tokens, 2 * SHORTEST_TOKENS) / SHORTEST_TOKENS)
    share = math.log2(max(tokens, SHORTEST_TOKENS) / SHORTEST_TOKENS) / span
    return min(n_cells - 1, int(share * n_cells))


def _axis(n_cells: int, longest_tokens: int) -> str:
    """Powers of two where there is room for them."""
    axis = " " * n_cells
    tokens, free = SHORTEST_TOKENS, 0
    while tokens <= longest_tokens:
        label = str(tokens) if tokens < 1024 else f"{tokens // 1024}k"
        at = cell_of(tokens, n_cells, longest_tokens)
        if at >= free and at + len(label) <= n_cells:
            axis = axis[:at] + label + axis[at + len(label) :]
            free = at + len(label) + 1
        tokens *= 2
    return axis


def _lane(instance: dict[str, Any], stages: Sequence[dict[str, Any]], n_cells: int, longest_tokens: int) -> Text:
    stage = None if instance["stage"] is None else stages[instance["stage"]]
    lo, hi = (0, longest_tokens) if stage is None else (stage["lo"], stage["hi"] or longest_tokens + 1)
    counts, outside = [0] * n_cells, [False] * n_cells
    for tokens in instance["lengths"]:
        cell = cell_of(tokens, n_cells, longest_tokens)
        counts[cell] += 1
        outside[cell] |= not lo <= tokens < hi and stage is not None
    first, last = cell_of(lo, n_cells, longest_tokens), cell_of(hi - 1, n_cells, longest_tokens)
    lane = Text()
    for cell, n in enumerate(counts):
        if n:
            lane.append(HEIGHTS[min(n, len(HEIGHTS)) - 1], style="yellow" if outside[cell] else "cyan")
        else:
            lane.append("·" if stage is not None and first <= cell <= last else " ", style="dim")
    return lane


def _note(i: dict[str, Any]) -> str:
    notes = [f"build {i['build']}"] if i["build"] else []
    if i["drain"]:
        notes.append(f"{i['requests']} of {i['drain']['requests_at_start']} left, {lasting(i['drain']['time_left_s'])}")
    if i["restart_in_s"] is not None:
        notes.append(f"starts in {lasting(i['restart_in_s'])}")
    if i["restarts"]:
        notes.append(f"restarts: {i['restarts']}")
    if i["last_error"] and (i["restarts"] or not i["up"]):
        notes.append(i["last_error"])
    return ", ".join(notes)


def _plan(picture: dict[str, Any], width: int) -> list[Text]:
    plan = picture["plan"]
    if plan is None:
        return [_line("no stages", width, "dim")]
    lines = [_line(f"stages in force for {lasting(plan['since_s'])}: {plan['why'] or 'instances came or went'}", width)]
    if plan["failure"]:
        lines.append(_line(f"unchanged because of a fault: {plan['failure']}", width, "red"))
    if (coming := plan["next"]) is not None and coming["due_s"] is not None:
        lines.append(
            _line(
                f"next plan in {lasting(coming['due_s'])}: {coming['requests']:.0f} of {coming['needed_requests']} "
                f"requests seen, must gain {coming['needed_gain']:.1%}",
                width,
                "dim",
            )
        )
    return lines


def _ended(move: dict[str, Any]) -> str:
    pause = move["pause_s"]
    pauses = "" if pause is None else "; pause " + ", ".join(f"{p} {_ms(pause[p])}" for p in ("p50", "p95", "p99"))
    return f"{move['count']} {move['outcome']} ({move['reason'].replace('_', ' ')}){pauses}"


def _recent(move: dict[str, Any]) -> str:
    pause = "" if move["pause_s"] is None else f", pause {_ms(move['pause_s'])}"
    return (
        f"{move['seconds_ago']:.0f} s ago  {move['source']} to {move['target']} at {move['tokens']} tokens: "
        f"{move['outcome']} ({move['reason'].replace('_', ' ')}){pause}"
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


def lasting(seconds: float) -> str:
    """A duration in its two largest units: `3 d 4 h`, `2 min 5 s`."""
    rest, parts = round(seconds), []
    for name, unit_s in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        n, rest = divmod(rest, unit_s)
        parts.append((n, name))
    largest = next((index for index, (n, _) in enumerate(parts) if n), len(parts) - 1)
    return " ".join(f"{n} {name}" for n, name in parts[largest : largest + 2])
