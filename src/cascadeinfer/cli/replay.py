"""
`cascadeinfer replay`: what an event log contains, and whether the policy would decide the same again.

Logs are written by `serve --event-log` and `simulate --event-log`. Exit codes: 0; 1 if `--check` finds a difference; 2
if the log cannot be read, or not checked to its end.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cascadeinfer.core.layout import StageLayout
    from cascadeinfer.eventlog.log_summary import LogSummary
    from cascadeinfer.eventlog.reader import LoggedEvent, LogReader
    from cascadeinfer.eventlog.replay import Difference

EXIT_DIFFERENT = 1
LAYOUTS_SHOWN = 10
MEMBERSHIPS_SHOWN = 20


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(replay)


def replay(
    file: Annotated[Path, typer.Argument(help="Event log: its newest file, or an older one; .gz too.")],
    *,
    request: Annotated[
        str | None, typer.Option(help="Tell this request's story instead; the beginning of its id is enough.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Give the events to a fresh policy and compare what it does.")
    ] = False,
) -> None:
    """
    Summarise an event log (rates, migrations by reason and outcome, layouts in force), or tell one
    request's story.
    """
    from cascadeinfer.eventlog.log_summary import summarise_log
    from cascadeinfer.eventlog.reader import open_log

    log = open_log(file)
    if request is not None:
        _tell_story(log, request)
    elif not check:
        _show(log, summarise_log(log))
    if check:
        _check(log)
    for note in log.notes:
        typer.echo(f"note: {note}", err=True)


def _check(log: "LogReader") -> None:
    from cascadeinfer.eventlog.replay import replay as replay_log

    header = log.header
    done = replay_log(log)
    if done.difference is None:
        typer.echo(f"{done.events} events, {done.effects} effects of {header.policy}: the replay does the same")
        return
    _show_difference(done.difference)
    typer.echo(f"written by version {header.version}, commit {header.commit or 'unknown'}")
    raise typer.Exit(EXIT_DIFFERENT)


def _show_difference(difference: "Difference") -> None:
    logged = difference.logged
    typer.echo(f"{logged.place}: event {logged.n} at {logged.at_s:.6f} s: the replay does something else")
    for earlier in difference.before:
        typer.echo(f"    before: {earlier.at_s:.6f} s {_short(earlier)} -> {len(earlier.effects)} effects")
    typer.echo(f"    event:  {logged.event}")
    then = [str(effect) for effect in logged.effects] or [f"raised {logged.failed}" if logged.failed else "nothing"]
    now = [str(effect) for effect in difference.effects] or [
        f"raised {difference.failed}" if difference.failed else "nothing"
    ]
    same = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
    if same:
        typer.echo(f"    {same} effects are the same, then")
    for title, effects in (("log:   ", then), ("replay:", now)):
        typer.echo(f"    {title} {effects[same] if same < len(effects) else 'nothing more'}")


def _short(logged: "LoggedEvent") -> str:
    """An event in a few words."""
    event = logged.event
    who = getattr(event, "request_id", None) or getattr(event, "instance_id", None) or event.cause
    return f"{type(event).__name__} {who}"


def _tell_story(log: "LogReader", beginning: str) -> None:
    from cascadeinfer.eventlog.story import find_request, story_of

    request_id = find_request(log, beginning)
    typer.echo(request_id)
    first_s: float | None = None
    for chapter in story_of(log, request_id):
        first_s = chapter.at_s if first_s is None else first_s
        typer.echo(f"  {chapter.at_s - first_s:+10.3f} s  {chapter.text}")


def _show(log: "LogReader", summary: "LogSummary") -> None:
    header = log.header
    typer.echo(f"{header.policy} on {len(header.instances)} instances ({header.source}), started {header.started_at}")
    written = f"version {header.version}" + (f", commit {header.commit[:12]}" if header.commit else "")
    typer.echo(
        f"written by {written}; {len(log.paths)} files" + (f"; profile {header.profile}" if header.profile else "")
    )
    for name, value in header.about.items():
        typer.echo(f"  {name}: {value}")
    if header.part > 1:
        typer.echo(f"the log begins with part {header.part}; what was before it was rotated away")
    if summary.missing:
        typer.echo(f"{summary.missing} events are missing: the writer could not keep up")
    if summary.failed:
        typer.echo(f"at {summary.failed} events the policy failed; the server's log has the tracebacks")
    span_s = summary.span_s
    events = sum(summary.events.values())
    typer.echo(f"\n{events} events in {span_s:.3f} s")
    for kind, count in sorted(summary.events.items()):
        typer.echo(f"  {kind:20} {count:9} {count / span_s if span_s else 0.0:12.2f} per s")
    if summary.arrived:
        typer.echo(f"\nrequests: {summary.arrived} arrived, {summary.finished} ended, {summary.rejected} refused")
        typer.echo(f"  {summary.prompt_tokens / summary.arrived:.1f} prompt tokens on average")
        if summary.finished:
            typer.echo(f"  {summary.output_tokens / summary.finished:.1f} output tokens on average")
        for instance_id, count in sorted(summary.dispatches.items()):
            typer.echo(f"  {count} dispatched to {instance_id}")
    _show_changes(summary)


def _show_changes(summary: "LogSummary") -> None:
    if summary.migrations:
        typer.echo(f"\nmigrations: {sum(summary.migrations.values())} ended")
        for (reason, outcome, detail), count in sorted(summary.migrations.items()):
            typer.echo(f"  {reason:16} {outcome:12} {detail:28} {count:7}")
    if summary.messages:
        sent = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.messages.items()))
        typer.echo(f"\nbid-ask messages: {sent}")
    start_s = summary.first_s or 0.0
    if summary.layouts:
        typer.echo(f"\nlayouts: {len(summary.layouts)}, the last of them")
        for at_s, published in summary.layouts[-LAYOUTS_SHOWN:]:
            reasons = "; ".join(part for part in (published.why, published.failure) if part)
            why = f"  ({reasons})" if reasons else ""
            typer.echo(f"  from {at_s - start_s:10.3f} s  {_layout(published.layout)}{why}")
    if summary.advice:
        typer.echo(f"\nnumbers of instances advised: {len(summary.advice)}, the last of them")
        for at_s, advised in summary.advice[-LAYOUTS_SHOWN:]:
            typer.echo(f"  at   {at_s - start_s:10.3f} s  {advised.n_instances or 'none'}  ({advised.why})")
    if summary.memberships:
        typer.echo(f"\ninstances: {len(summary.memberships)} changes, the last of them")
        for at_s, what, instance_id in summary.memberships[-MEMBERSHIPS_SHOWN:]:
            typer.echo(f"  at   {at_s - start_s:10.3f} s  {instance_id} {what}")


def _layout(layout: "StageLayout") -> str:
    return ", ".join(f"{stage.range}: {' '.join(stage.instance_ids)}" for stage in layout.stages)
