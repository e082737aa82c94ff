"""
The terminal views of `cascadeinfer demo`: the live board and the final summary.

All are pure functions of the states; nothing is polled here.

On the board, a request's bar is its length in tokens: the prompt dim, the answer in the colours of the stages that
generated it, and a mark at the boundary between the stages. Only the instances panel shows the server's figures;
everything else is measured at the client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cascadeinfer.demo.requests import ChatState

STAGE_COLOURS: Final = ("green", "magenta", "cyan", "yellow")
BAR_CELLS: Final = 28
KV_BAR_CELLS: Final = 12
NEWS_LINES: Final = 4


@dataclass(slots=True)
class Board:
    """
    Everything the live view shows.

    Attributes:
        boundary_tokens: The boundary between the two stages.
        snapshot: The latest JSON of `/admin/instances`; empty before the first.
        news: What happened, with seconds since the first request.
    """

    states: Sequence[ChatState]
    boundary_tokens: int
    snapshot: dict[str, Any] = field(default_factory=dict)
    news: list[tuple[float, str]] = field(default_factory=list)

    @property
    def stage_of(self) -> dict[str, int]:
        """Stage number by instance id."""
        return {instance["id"]: instance["stage"] for instance in self.snapshot.get("instances", ())}


def render_board(board: Board, elapsed_s: float) -> RenderableType:
    """The whole live view."""
    return Group(
        _requests_table(board),
        Panel(_instances_table(board), title=f"instances, {elapsed_s:.0f} s", title_align="left", border_style="dim"),
        *(Text(f"{at_s:6.1f} s  {line}", style="dim") for at_s, line in board.news[-NEWS_LINES:]),
    )


def _requests_table(board: Board) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), expand=True)
    table.add_column("#", justify="right")
    table.add_column("request", no_wrap=True)
    table.add_column(f"length in tokens, stages meet at {board.boundary_tokens}", no_wrap=True, min_width=BAR_CELLS)
    table.add_column("", justify="right")
    table.add_column("runs in", no_wrap=True)
    table.add_column("moves", justify="right")
    table.add_column("text", no_wrap=True, ratio=1, overflow="ellipsis")
    scale_tokens = max(
        (s.task.max_tokens + max(s.prompt_tokens, 1) for s in board.states), default=board.boundary_tokens
    )
    for state in board.states:
        total = state.prompt_tokens + state.output_tokens
        table.add_row(
            str(state.number),
            state.task.title,
            length_bar(state, board, scale_tokens),
            str(total) if total else "",
            _place(state, board),
            str(state.moves) if state.moves else "",
            Text(" ".join(state.text.split())[-60:], style="dim" if state.ended_s is not None else ""),
        )
    return table


def length_bar(state: ChatState, board: Board, scale_tokens: int) -> Text:
    """A request's length: the prompt dim, the answer in the colours of the stages it was in, a mark at the boundary."""

    def cells(tokens: int) -> int:
        return min(BAR_CELLS, round(tokens / scale_tokens * BAR_CELLS))

    prompt, total = cells(state.prompt_tokens), cells(state.prompt_tokens + state.output_tokens)
    places = [(cells(tokens), _stage_colour(instance_id, board)) for instance_id, tokens in state.places]
    bar = Text()
    for cell in range(BAR_CELLS):
        if cell < prompt:
            bar.append("█", style="bright_black")
        elif cell < total:
            bar.append("█", style=next((colour for begin, colour in reversed(places) if begin <= cell), "white"))
        else:
            bar.append("│" if cell == cells(board.boundary_tokens) else "·", style="dim")
    return bar


def _stage_colour(instance_id: str | None, board: Board) -> str:
    stage = board.stage_of.get(instance_id or "")
    return "white" if stage is None else STAGE_COLOURS[stage % len(STAGE_COLOURS)]


def _place(state: ChatState, board: Board) -> Text:
    if state.error:
        return Text("failed", style="bold red")
    if state.ended_s is not None:
        return Text(f"done ({state.finish_reason})", style="dim")
    if state.sent_s is None:
        return Text("not sent yet", style="dim")
    if state.instance_id is None:
        return Text("on its way", style="dim")
    stage = board.stage_of.get(state.instance_id)
    return Text(f"stage {stage}, instance {state.instance_id}", style=_stage_colour(state.instance_id, board))


def _instances_table(board: Board) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("instance", "stage", "up", "requests", "KV cache", "KV pulls", "pulled tokens"):
        table.add_column(heading)
    ranges = [stage["range"] for stage in board.snapshot.get("stages", ())]
    for instance in board.snapshot.get("instances", ()):
        stage = instance["stage"]
        full = round(instance["kv_usage"] * KV_BAR_CELLS)
        table.add_row(
            Text(instance["id"], style=_stage_colour(instance["id"], board)),
            f"{stage}: {ranges[stage]} tokens" if stage is not None else "none",
            "yes" if instance["up"] else Text("no", style="bold red"),
            f"{instance['requests']}",
            "█" * full + "·" * (KV_BAR_CELLS - full) + f" {instance['kv_usage']:.0%}",
            str(instance["kv_pulls"]),
            str(_came(instance)),
        )
    migrations = board.snapshot.get("migrations", {"under_way": 0, "ended": {}})
    ended = ", ".join(f"{n} {outcome}" for outcome, n in migrations["ended"].items()) or "none yet"
    table.caption = Text(f"migrations: {ended}; under way: {migrations['under_way']}")
    table.caption_justify = "left"
    return table


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """One request's row of the summary; times in seconds, None where there were too few tokens."""

    number: int
    title: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    mean_itl_s: float | None
    longest_gap_s: float | None
    moves: int
    finish_reason: str
    error: str
    text: str


@dataclass(frozen=True, slots=True)
class TextCheck:
    """
    A moved request's answer, compared with that of the same request sent again and kept on one instance.

    Attributes:
        same_text: Whether the two answers are equal.
        stayed: Whether the second request really stayed on its instance.
        moved_text: Answer of the request that moved.
        stayed_text: Answer of the request that stayed.
    """

    number: int
    same_text: bool
    stayed: bool
    moved_text: str
    stayed_text: str


def _came(instance: Mapping[str, Any]) -> int:
    """Tokens whose KV cache an instance got from others, before the cut of their request or after it."""
    return int(instance["pulled_tokens"] + instance["precopied_tokens"])


@dataclass(frozen=True, slots=True)
class Summary:
    """
    The outcome of a demo.

    Attributes:
        start_s: From the start of the server to its first answer.
        wall_s: From sending the first request to the end of the last.
        migrations: Ended migrations by outcome, as counted by the server.
        kv_pulls: Requests whose KV cache was pulled, as counted by the engines.
        mean_pause_s: Mean pause of a move as measured by the server; None without one.
        check: None if no request moved.
    """

    model: str
    start_s: float
    wall_s: float
    requests: tuple[RequestSummary, ...]
    migrations: dict[str, int]
    kv_pulls: int
    pulled_tokens: int
    mean_pause_s: float | None
    check: TextCheck | None

    @property
    def output_tokens(self) -> int:
        """Answer tokens of all requests."""
        return sum(request.output_tokens for request in self.requests)

    @property
    def moved_itl_s(self) -> float | None:
        """Mean time between tokens of the requests that moved."""
        values = [r.mean_itl_s for r in self.requests if r.moves and r.mean_itl_s is not None]
        return fmean(values) if values else None

    def failures(self) -> list[str]:
        """Why the demo did not show what it should; empty if it did."""
        found = [f"request {r.number} ({r.title}) failed: {r.error}" for r in self.requests if r.error]
        found += [
            f"request {r.number} ({r.title}) gave no token" for r in self.requests if not (r.error or r.output_tokens)
        ]
        if not self.migrations.get("moved"):
            found.append("no request was handed over with its KV cache")
        if self.check is not None and not self.check.stayed:
            found.append(f"the repetition of request {self.check.number} did not stay on one instance")
        if self.check is not None and not self.check.same_text:
            found.append(f"request {self.check.number} answered otherwise when it stayed on one instance")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {**asdict(self), "output_tokens": self.output_tokens, "failures": self.failures()}


def summarise(
    states: Sequence[ChatState], snapshot: dict[str, Any], pause: tuple[float, int], *,
    model: str, start_s: float, check: TextCheck | None,
) -> Summary:  # fmt: skip
    """
    Summarise a run.

    Args:
        states: The requests, all ended.
        snapshot: `/admin/instances` after the last of them.
        pause: Total seconds and number of the server's pauses of moved requests.
        model: Name of the model.
        start_s: Seconds from the start of the server to its first answer.
        check: The comparison, if there was anything to compare.
    """
    sent = [s.sent_s for s in states if s.sent_s is not None]
    ended = [s.ended_s for s in states if s.ended_s is not None]
    total_s, n_pauses = pause
    return Summary(
        model=model,
        start_s=start_s,
        wall_s=max(ended) - min(sent),
        requests=tuple(
            RequestSummary(
                s.number, s.task.title, s.prompt_tokens, s.output_tokens, s.ttft_s, s.mean_itl_s, s.longest_gap_s,
                s.moves, s.finish_reason, s.error, s.text,
            )
            for s in states
        ),
        migrations=dict(snapshot["migrations"]["ended"]),
        kv_pulls=sum(instance["kv_pulls"] for instance in snapshot["instances"]),
        pulled_tokens=sum(_came(instance) for instance in snapshot["instances"]),
        mean_pause_s=total_s / n_pauses if n_pauses else None,
        check=check,
    )  # fmt: skip


def render_summary(summary: Summary) -> RenderableType:
    """The table and the sentences at the end."""
    table = Table(title=f"{summary.model}: {len(summary.requests)} requests", title_justify="left")
    for heading in ("#", "request", "prompt", "answer", "first token", "mean gap", "longest gap", "moves", "ended by"):
        table.add_column(heading, justify="left" if heading in {"request", "ended by"} else "right")
    for r in summary.requests:
        table.add_row(
            str(r.number), r.title, str(r.prompt_tokens), str(r.output_tokens), _ms(r.ttft_s), _ms(r.mean_itl_s),
            _ms(r.longest_gap_s), str(r.moves), Text(r.error, style="red") if r.error else r.finish_reason,
        )  # fmt: skip
    speed = summary.output_tokens / summary.wall_s
    ended = ", ".join(f"{n} {outcome}" for outcome, n in summary.migrations.items()) or "none"
    pulls = f"KV caches pulled between the engines: {summary.kv_pulls} ({summary.pulled_tokens} tokens)"
    start = f"the server started in {summary.start_s:.0f} s"
    lines = [
        f"{summary.output_tokens} tokens in {summary.wall_s:.1f} s: {speed:.1f} tokens/s ({start})",
        f"migrations: {ended}; {pulls}",
        *_pause_lines(summary),
        *_check_lines(summary.check),
    ]
    return Group(table, *(Text(line) for line in lines))


def _pause_lines(summary: Summary) -> list[str]:
    if summary.mean_pause_s is None or summary.moved_itl_s is None:
        return []
    ratio = summary.mean_pause_s / summary.moved_itl_s
    against = "the mean gap between tokens of the requests that moved"
    return [f"pause of a move: {_ms(summary.mean_pause_s)} on average, {ratio:.1f} x {against}"]


def _check_lines(check: TextCheck | None) -> list[str]:
    if check is None:
        return ["no request was seen to move, so no answers were compared"]
    verdict = "identical" if check.same_text else "DIFFERENT"
    return [
        (
            f"request {check.number} sent again and kept on one instance: "
            f"text {verdict} ({len(check.moved_text)} characters)"
        )
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.0f} ms"
