"""
`cascadeinfer demo`: the whole system at work on this machine, in two minutes.

It starts `cascadeinfer serve` with two instances and two length stages, sends chat requests of different lengths with
the official `openai` client, and shows in the terminal how they grow and are handed over. Then it sends one of the
moved requests again, kept on one instance this time, and compares the two answers. Finally it stops the server, also
after Ctrl-C or an error.

With `--cluster` the engines are on a Ray cluster: on that of `cascadeinfer cluster up` if it runs, else on one that is
started for the demo and ended with it.

The exit code is 0 only if every request succeeded, at least one was handed over with its KV cache, and the two answers
are identical. A terminal gets a live view; a pipe or a log gets plain lines.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from cascadeinfer.cli.extras import need
from cascadeinfer.cli.stop import stop_on_ray
from cascadeinfer.cluster import ray_here
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.demo.requests import STAYS, ChatState, make_states, run_chat, take_placements
from cascadeinfer.demo.server import N_INSTANCES, POLL_S, STAGE_BOUNDARY_TOKENS, DemoServer
from cascadeinfer.demo.view import Board, Summary, TextCheck, render_board, render_summary, summarise
from cascadeinfer.loadgen.served_process import ServerFailedError
from cascadeinfer.results.output_files import check_output, replacing

if TYPE_CHECKING:
    from openai import AsyncOpenAI

STAGGER_S: Final = 1.0
"""Time between two requests: short ones still overlap, and the eye can follow."""
PLAIN_PROGRESS_S: Final = 10.0
PINNED: Final = "cascadeinfer_pinned_requests_total"
MOVES: Final = "cascadeinfer_migrations_total"
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(demo)


def demo(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or repository of a chat model. Default: the embedded SmolLM2-135M-Instruct."),
    ] = None,
    requests: Annotated[int, typer.Option(min=2, max=32, help="How many chat requests to send.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary to this file as JSON.")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Keep the engines on a Ray cluster on this machine.", show_default=False)
    ] = False,
) -> None:
    """Start two instances, send chat requests, show them move, compare, stop."""
    console = Console()
    if json_file is not None:
        check_output(json_file, "--json")
    need("vllm")
    if cluster:
        need("ray")
    folder, name = _model_of(model, console)
    fleet = f"demo-{uuid.uuid4().hex[:6]}" if cluster else None
    server = DemoServer(folder, name, fleet)
    try:
        with _ray_for(fleet, console), _stopped_at_the_end(server, console):
            summary = asyncio.run(_run(server, requests, console))
    except ServerFailedError as error:
        console.print(f"[bold red]{escape(error.reason)}[/]; the end of its log, {error.log}:")
        console.print(error.log_tail, markup=False, highlight=False, style="dim")
        raise typer.Exit(EXIT_FAILED) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; the server has been stopped")
        server.log.unlink()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    console.print(render_summary(summary))
    if json_file is not None:
        _write(json_file, summary)
    if failures := summary.failures():
        for failure in failures:
            console.print(f"[bold red]{escape(failure)}[/]")
        console.print(f"the server's log: {server.log}")
        raise typer.Exit(EXIT_FAILED)
    server.log.unlink()
    console.print("every request succeeded, and the server has been stopped")


@contextlib.contextmanager
def _ray_for(fleet: str | None, console: Console) -> Iterator[None]:
    """A Ray cluster for this fleet, if there is one; afterwards nothing of the fleet is left."""
    if fleet is None:
        yield
        return
    if (runs := ray_here.head()) is not None:
        console.print(f"using Ray at {runs.address}", highlight=False)
        try:
            yield
        finally:
            with _said(console, "stopping the engines"):
                stop_on_ray(fleet)
        return
    with _said(console, "starting Ray for the demo"):
        n_cpus = max(N_INSTANCES, os.cpu_count() or 1)  # as Ray counts them
        ray_here.up(ray_here.own_address(), ray_here.free_head_port(), n_cpus, None)
    try:
        yield
    finally:
        with _said(console, "stopping Ray and the engines"):
            ray_here.down()


@contextlib.contextmanager
def _stopped_at_the_end(server: DemoServer, console: Console) -> Iterator[None]:
    """Stop the server whatever happens, and say so in the terminal, since it takes some seconds."""
    try:
        yield
    finally:
        said = console.status("stopping the server") if console.is_terminal else contextlib.nullcontext()
        with said, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C again: the rest has been killed
            server.stop()


@contextlib.contextmanager
def _said(console: Console, sentence: str) -> Iterator[None]:
    """Say what is going on: with a spinner in a terminal, which shows nothing elsewhere, so there as a line."""
    if console.is_terminal:
        with console.status(sentence):
            yield
        return
    console.print(sentence, highlight=False)
    yield


def _model_of(model: str | None, console: Console) -> tuple[str, str]:
    """The model's folder or repository, and the name under which it is served."""
    if model is None:
        from cascadeinfer.engines.models import embedded

        with _said(console, "preparing the embedded model (SmolLM2-135M-Instruct), once per machine"):
            return str(embedded.prepare()), embedded.NAME
    path = Path(model).expanduser()
    if not path.is_dir() and (path.exists() or model.startswith((".", "/", "~"))):
        raise ConfigError(
            f"{model} is not a model folder",
            option="--model",
            fix="name a Hugging Face folder, or give none for the embedded model",
        )
    return (str(path), path.resolve().name) if path.is_dir() else (model, model)


def _write(path: Path, summary: Summary) -> None:
    with replacing(path, "--json") as beside:
        beside.write_text(json.dumps(summary.to_json(), indent=2) + "\n", encoding="utf-8")


async def _run(server: DemoServer, n_requests: int, console: Console) -> Summary:
    """Everything between start and stop; the caller stops the server."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    server.start()
    with _starting(console, server) as tick:
        start_s = await server.becomes_ready(tick)
    console.print(
        f"two instances serve {server.model_name} at {server.base_url} (after {start_s:.0f} s)", highlight=False
    )

    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    # No proxy from the environment between us and the loopback, and no retries: a failed request should be visible.
    http_client = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, http_client=http_client) as client:
        states = make_states(n_requests, f"demo-{uuid.uuid4().hex[:6]}")
        board = Board(states, STAGE_BOUNDARY_TOKENS)
        await _watch(server, board, console, lambda: _send_all(client, server.model_name, states))
        check = await _check(client, server, states, console)
    snapshot = await server.snapshot()
    pause = pause_of(await server.text("/metrics"))
    return summarise(states, snapshot, pause, model=server.model_name, start_s=start_s, check=check)


@contextlib.contextmanager
def _starting(console: Console, server: DemoServer) -> Iterator[Callable[[float], None]]:
    """
    Show a spinner, or an occasional line, while the server starts: the seconds, and what takes them.

    Yields:
        A callback for the seconds waited.
    """
    if console.is_terminal:
        with console.status("starting two instances") as status:
            yield lambda waited_s: status.update(escape(_start_line(server, waited_s)))
        return
    said_s = -PLAIN_PROGRESS_S

    def tick(waited_s: float) -> None:
        nonlocal said_s
        if waited_s - said_s >= PLAIN_PROGRESS_S:
            said_s = waited_s
            console.print(_start_line(server, waited_s), highlight=False, markup=False, soft_wrap=True)

    yield tick


def _start_line(server: DemoServer, waited_s: float) -> str:
    doing = server.doing()
    return f"starting two instances: {waited_s:.0f} s" + (f"; {doing}" if doing else "")


async def _send_all(client: "AsyncOpenAI", model: str, states: list[ChatState]) -> None:
    """Send the requests one after the other, without waiting for answers in between."""
    async with asyncio.TaskGroup() as group:
        for state in states:
            group.create_task(run_chat(client, model, state))
            await asyncio.sleep(STAGGER_S)


async def _watch(server: DemoServer, board: Board, console: Console, send: Callable[[], Any]) -> None:
    """Send the requests and show them until all have ended."""
    began_s = time.monotonic()
    sending = asyncio.ensure_future(send())
    said = 0
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop") if console.is_terminal else None
    with live or contextlib.nullcontext():
        try:
            done = False
            while not done:
                done = sending.done()  # read before the update, so that the last update includes the last token
                board.snapshot = await server.snapshot()
                elapsed_s = time.monotonic() - began_s
                board.news += [(elapsed_s, line) for line in take_placements(board.snapshot, list(board.states))]
                board.news += [(elapsed_s, line) for line in _endings(board)]
                if live is not None:
                    live.update(render_board(board, elapsed_s), refresh=True)
                else:
                    for at_s, line in board.news[said:]:
                        console.print(f"{at_s:6.1f} s  {line}", highlight=False, markup=False)
                    said = len(board.news)
                await asyncio.wait([sending], timeout=POLL_S)
            await sending
        finally:
            sending.cancel()


def _endings(board: Board) -> list[str]:
    """A sentence for each newly ended request."""
    said = {line for _, line in board.news}
    sentences = [
        f"request {state.number} ({state.task.title}) "
        + (
            f"failed: {state.error}"
            if state.error
            else f"ended after {state.output_tokens} tokens ({state.finish_reason})"
        )
        for state in board.states
        if state.ended_s is not None
    ]
    return [sentence for sentence in sentences if sentence not in said]


async def _check(
    client: "AsyncOpenAI", server: DemoServer, states: list[ChatState], console: Console
) -> TextCheck | None:
    """Send the shortest answer that moved once more, kept on one instance, and compare; None if none moved."""
    moved = [state for state in states if state.moves and not state.error]
    if not moved:
        return None
    first = min(moved, key=lambda state: state.output_tokens)
    again = ChatState(first.number, first.task, f"again-{first.request_id}")
    sentence = f"sending request {first.number} again, kept on one instance, to compare the text"
    before = await server.text("/metrics")
    with _said(console, sentence):
        sending = asyncio.ensure_future(run_chat(client, server.model_name, again, STAYS))
        try:
            while not sending.done():
                await server.snapshot()  # raises if the server is gone
                await asyncio.wait([sending], timeout=POLL_S)
        finally:
            sending.cancel()
    after = await server.text("/metrics")
    if again.error:
        raise server.failure(f"the repetition of request {first.number} failed: {again.error}")
    return TextCheck(
        number=first.number,
        same_text=again.text == first.text,
        # The counters include it however short it was, and nobody else uses this server.
        stayed=total_of(after, PINNED) == total_of(before, PINNED) + 1
        and total_of(after, MOVES) == total_of(before, MOVES),
        moved_text=first.text,
        stayed_text=again.text,
    )


def total_of(metrics: str, sample_name: str, **labels: str) -> float:
    """Sum of the samples with this name and these labels, from the text of `/metrics`."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = (sample for family in text_string_to_metric_families(metrics) for sample in family.samples)
    return sum(s.value for s in samples if s.name == sample_name and labels.items() <= s.labels.items())


def pause_of(metrics: str) -> tuple[float, int]:
    """Total seconds and number of the pauses of moved requests, from the text of `/metrics`."""
    name = "cascadeinfer_migration_pause_seconds"
    return total_of(metrics, f"{name}_sum", outcome="moved"), int(total_of(metrics, f"{name}_count", outcome="moved"))
