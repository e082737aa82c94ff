"""
`cascadeinfer bench`: replays a trace on a live OpenAI server in open loop, and compares such runs.

The load generator is our own and small. Of the well-maintained ones, NVIDIA's aiperf and guidellm replay timed traces
too, but they bring forty packages (some pinned against vLLM's) or torch with them, and they spread over several
processes, which on one machine take cores from the engines under test. vLLM's `bench serve` needs vLLM on the client's
machine, and counts latencies from when a request was sent, not from when it was due. None of the three checks that
prompts have the trace's length.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from cascadeinfer.cli import experiment_options as options
from cascadeinfer.cli.extras import need
from cascadeinfer.core.errors import ConfigError

if TYPE_CHECKING:
    from cascadeinfer.loadgen.client import Api
    from cascadeinfer.loadgen.prompts import PromptKind
    from cascadeinfer.loadgen.replay import Replay
    from cascadeinfer.results.record_files import RecordFile
    from cascadeinfer.results.summary import Slo
    from cascadeinfer.workload.trace import Trace

Word = TypeVar("Word", bound=str)
Value = TypeVar("Value")

APIS: Final[tuple["Api", ...]] = ("completions", "chat")
PROMPT_KINDS: Final[tuple["PromptKind", ...]] = ("ids", "text", "words")
EXIT_INTERRUPTED: Final = 130
KEY_VARIABLE: Final = "OPENAI_API_KEY"
LATE_S: Final = 0.02
"""A client whose sends are late by this much at the 99th percentile visibly adds to the latencies it measures."""

Label = Annotated[
    str | None, typer.Option(help="What is measured; runs of one label are repetitions. Default: the URL.")
]
LongTokens = Annotated[
    int | None,
    typer.Option(help="Prompt and answer together from which a request counts as long. Default: 4 times the median."),
]
PlotPrefix = Annotated[
    str | None, typer.Option(help="Prefix of PNG files: PREFIX-all.png, PREFIX-short.png, PREFIX-long.png.")
]


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command and its subcommand."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(bench)
    group.command("compare")(compare)
    app.add_typer(group, name=name, help=help_text)


def bench(
    context: typer.Context,
    *,
    url: Annotated[str | None, typer.Option(help="URL of the server, e.g. http://127.0.0.1:8000. Required.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace file (.csv or .jsonl, also .gz): arrivals and lengths. Required.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second. Default: as recorded in the trace.")] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            help="When requests come: `recorded`, `poisson`, or `gamma:CV`; the last two draw from the lengths."
        ),
    ] = "recorded",
    requests: Annotated[int | None, typer.Option(help="Number of requests. Default: as many as the trace has.")] = None,
    max_context: Annotated[
        int, typer.Option(help="Longest sequence; longer requests are cut, and counted.")
    ] = options.DEFAULT_CONTEXT,
    hashes: Annotated[
        Path | None, typer.Option(help="JSONL file with `row_id` and `hash_ids`: prompts share these blocks.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals, lengths and the words of prompts.")] = 0,
    model: Annotated[str | None, typer.Option(help="Name of the model. Default: the server's first.")] = None,
    api: Annotated[str, typer.Option(help="`completions` or `chat`.")] = "completions",
    prompts: Annotated[
        str, typer.Option(help="`ids` and `text` have exact lengths and need `/tokenize`; `words` one word per token.")
    ] = "text",
    tokenize_url: Annotated[
        str | None, typer.Option(help="Server with `/tokenize` for this model, where --url has none (a router).")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds after which a request's client leaves.")] = 600.0,
    warm_up: options.WarmUp = 0.1,
    ttft_slo: options.TtftSlo = 2.0,
    tpot_slo: options.TpotSlo = 0.1,
    long_tokens: LongTokens = None,
    label: Label = None,
    out: Annotated[Path | None, typer.Option(help="Write one row per request (Parquet).")] = None,
    json_file: options.JsonFile = None,
    plot: PlotPrefix = None,
) -> None:
    """
    Replay a trace on any OpenAI server. Each request is sent at its time, however the earlier ones fare.

    Latencies count from the time a request was due. Failures are counted and reported; exit code 1 if no request
    succeeded.
    """
    if context.invoked_subcommand is not None:
        return
    need("aiohttp")
    from cascadeinfer.results.record_files import RecordFile, write_records

    url, trace = _required(url, "--url"), _required(trace, "--trace")
    slo = _checked(ttft_slo, tpot_slo, warm_up, long_tokens)
    options.positive(timeout_s, "--timeout-s")
    drawn = None if plot is None else Path(plot)
    options.check_outputs({"--out": out, "--json": json_file, "--plot": drawn}, matplotlib=plot is not None)
    kinds = (_word(api, APIS, "--api"), _word(prompts, PROMPT_KINDS, "--prompts"))
    work = _workload(trace, hashes, max_context, arrivals, requests, rate, seed)
    result = asyncio.run(_replay(work, url, kinds, model, seed, tokenize_url, timeout_s))
    header = _header(label or url, slo, warm_up, long_tokens, url=url, trace=str(trace), seed=seed)
    if out is not None:
        write_records(out, result.records, result.errors, header)
    _tell_notes(result)
    _show([RecordFile(result.records, result.errors, header)], slo, warm_up, long_tokens, json_file, plot)
    if result.interrupted or not result.records.finished.any():
        sys.exit(EXIT_INTERRUPTED if result.interrupted else 1)


def compare(
    files: Annotated[
        list[Path], typer.Argument(help="Record files of `bench --out`; the first label is the reference.")
    ],
    *,
    ttft_slo: Annotated[
        float | None, typer.Option(help="SLO: maximum seconds to the first token. Default: as recorded.")
    ] = None,
    tpot_slo: Annotated[
        float | None, typer.Option(help="SLO: maximum seconds per token after it. Default: as recorded.")
    ] = None,
    warm_up: options.WarmUp = 0.1,
    long_tokens: LongTokens = None,
    json_file: options.JsonFile = None,
    plot: PlotPrefix = None,
) -> None:
    """
    Compare runs: figures per label, and ratios to the first label.

    Files with the same label are repetitions: the first of each label is compared with the first of the others, and so
    on.
    """
    from cascadeinfer.results.record_files import read_records

    drawn = None if plot is None else Path(plot)
    options.check_outputs({"--json": json_file, "--plot": drawn}, matplotlib=plot is not None)
    read = [read_records(file) for file in files]
    recorded = read[0].header["slo"]
    slo = _checked(
        recorded["ttft_s"] if ttft_slo is None else ttft_slo,
        recorded["tpot_s"] if tpot_slo is None else tpot_slo,
        warm_up,
        long_tokens,
    )
    _show(read, slo, warm_up, long_tokens, json_file, plot)


def _required(value: Value | None, option: str) -> Value:
    """The value of an option that typer cannot require, because the subcommand does not have it."""
    if value is None:
        raise ConfigError("is required", option=option, fix="cascadeinfer bench --help lists the options")
    return value


def _checked(ttft_slo: float, tpot_slo: float, warm_up: float, long_tokens: int | None) -> "Slo":
    """The SLO, after the other options that affect the figures have been checked."""
    options.share(warm_up, "--warm-up")
    if long_tokens is not None:
        options.at_least_one(long_tokens=long_tokens)
    return options.slo_of(ttft_slo, tpot_slo)


def _word(text: str, known: tuple[Word, ...], option: str) -> Word:
    for word in known:
        if text == word:
            return word
    raise ConfigError(f"{text!r} is not known", option=option, fix=", ".join(known))


def _workload(
    file: Path,
    hashes: Path | None,
    max_context: int,
    arrivals: str,
    requests: int | None,
    rate: float | None,
    seed: int,
) -> "Trace":
    """The requests to send; notes on standard error what was cut."""
    import numpy as np

    from cascadeinfer.config.traces import load_trace
    from cascadeinfer.workload.drawing import draw_requests

    if rate is not None:
        options.positive(rate, "--rate")
    if max_context < 2:
        raise ConfigError(f"{max_context} is not at least 2", option="--max-context")
    capped = load_trace(file, hashes_path=hashes).capped(max_context)
    if not len(capped.trace):
        raise ConfigError(f"{file} has no requests", option="--trace")
    if requests is not None:
        options.at_least_one(requests=requests)
    if capped.trace.dropped_rows:
        typer.echo(f"note: {capped.trace.dropped_rows} requests of the trace that had no answer are left out", err=True)
    if capped.prompts_cut or capped.outputs_cut:
        typer.echo(
            f"note: {capped.prompts_cut} prompts and {capped.outputs_cut} outputs of the trace are cut to "
            "--max-context",
            err=True,
        )
    count = len(capped.trace) if requests is None else requests
    return draw_requests(capped.trace, options.arrivals_of(arrivals), count, rate, np.random.default_rng(seed))


async def _replay(
    trace: "Trace",
    url: str,
    kinds: tuple["Api", "PromptKind"],
    model: str | None,
    seed: int,
    tokenize_url: str | None,
    timeout_s: float,
) -> "Replay":
    """Connect, find the words for prompts, and replay with a progress bar."""
    from cascadeinfer.cli.tables import progress_bar
    from cascadeinfer.loadgen.client import OpenAiClient
    from cascadeinfer.loadgen.prompts import make_prompts
    from cascadeinfer.loadgen.replay import replay

    async with OpenAiClient.connect(url, api=kinds[0], model=model, api_key=os.environ.get(KEY_VARIABLE)) as client:
        maker = await make_prompts(client, trace, kinds[1], seed=seed, tokenize_url=tokenize_url)
        with progress_bar() as progress:
            bar = progress.add_task(client.model, total=len(trace))
            name = f"bench-{os.getpid()}-{seed}"
            return await replay(
                trace, client, maker, timeout_s=timeout_s, name=name, on_end=lambda _: progress.advance(bar)
            )


def _header(label: str, slo: "Slo", warm_up: float, long_tokens: int | None, **more: Any) -> dict[str, Any]:
    from cascadeinfer import __version__
    from cascadeinfer.results.provenance import own_commit

    return {
        "label": label,
        "slo": asdict(slo),
        "warm_up": warm_up,
        "long_tokens": long_tokens,
        "version": __version__,
        "commit": own_commit(),
        "command": sys.argv,
        "load_average": os.getloadavg()[0],
        **more,
    }


def _tell_notes(result: "Replay") -> None:
    """Print to standard error every condition under which the figures are not what they seem."""
    import numpy as np

    n = len(result.records)
    lateness_s = result.records.dispatched_s - result.records.arrival_s
    late_s = float(np.nanpercentile(lateness_s, 99)) if np.isfinite(lateness_s).any() else 0.0
    notes = {
        f"interrupted: the figures are those of the first {n} requests": result.interrupted,
        f"requests were sent {late_s:.3f} s late (99th percentile): the client's machine is too busy": late_s > LATE_S,
        (
            f"{result.ended_early} of {n} answers ended before their length: the server does not know `ignore_eos`"
        ): result.ended_early,
        (
            f"the server counts {result.off_prompts} of {n} prompts otherwise than the trace; its counts are recorded"
        ): result.off_prompts,
        (
            f"{result.counted_by_chunks} answers came without usage: their tokens are counted by chunks"
        ): result.counted_by_chunks,
    }
    for note, holds in notes.items():
        if holds:
            typer.echo(f"note: {note}", err=True)


def _show(
    files: Sequence["RecordFile"],
    slo: "Slo",
    warm_up: float,
    long_tokens: int | None,
    json_file: Path | None,
    plot: str | None,
) -> None:
    """Print tables to standard output, and write figures and JSON if asked for."""
    import numpy as np

    from cascadeinfer.cli.bench_tables import figure_tables, ratio_tables
    from cascadeinfer.cli.tables import console
    from cascadeinfer.results import estimates

    border = long_tokens or estimates.long_from_tokens(files[0].records)
    rng = np.random.default_rng(0)
    counted: dict[str, list[Any]] = {}
    runs: dict[str, list[dict[str, estimates.GroupSummary]]] = {}
    errors: dict[str, dict[str, int]] = {}
    for file in files:
        records = estimates.counted_rows(file.records, warm_up)
        if not len(records):
            raise ConfigError("leaves no request to count", option="--warm-up")
        counted.setdefault(file.label, []).append(records)
        runs.setdefault(file.label, []).append(estimates.summarise_groups(records, slo, border, rng))
        _tell_errors(file)
        for kind, count in estimates.errors_by_kind(file.errors).items():
            of_label = errors.setdefault(file.label, {})
            of_label[kind] = of_label.get(kind, 0) + count
    title = f"SLO {slo.ttft_s:g} s + {slo.tpot_s:g} s/token, long from {border} tokens"
    out = console()
    for table in (*figure_tables(runs, title), *ratio_tables(runs, title)):
        out.print(table)
    _tell_what_is_open([len(of_label) for of_label in runs.values()], estimates.LEAST_PAIRS)
    if json_file is not None:
        content = {
            label: {
                "errors": errors.get(label, {}),
                "runs": [{name: asdict(group) for name, group in run.items()} for run in of_label],
            }
            for label, of_label in runs.items()
        }
        settings = {"slo": asdict(slo), "warm_up": warm_up, "long_tokens": border}
        options.write_json(json_file, {**settings, "headers": [file.header for file in files], "labels": content})
    if plot is not None:
        _draw(plot, counted, border, title)


def _tell_errors(file: "RecordFile") -> None:
    """Print failures by kind, with one message of each, to standard error. Counts all requests, warm-up included."""
    from cascadeinfer.results.estimates import errors_by_kind

    for kind, count in errors_by_kind(file.errors).items():
        example = next(error for error in file.errors if error.partition(":")[0] == kind)
        typer.echo(f"{file.label}: {count} of {len(file.errors)} requests failed, e.g. {example}", err=True)


def _draw(prefix: str, counted: dict[str, list[Any]], border: int, title: str) -> None:
    """Plot the distributions over all requests, short ones and long ones."""
    from cascadeinfer.figures.drawing import latency_cdfs, save
    from cascadeinfer.results.estimates import GROUPS, groups_of

    for group in GROUPS:
        parts = {
            label: [run.rows(rows) for run in of_label if (rows := groups_of(run, border).get(group)) is not None]
            for label, of_label in counted.items()
        }
        parts = {label: of_label for label, of_label in parts.items() if of_label}
        if parts:
            save(latency_cdfs(parts, f"{group} requests (measured), {title}"), Path(f"{prefix}-{group}.png"))


def _tell_what_is_open(runs: Sequence[int], least_pairs: int) -> None:
    """Note on standard error that too few runs say nothing about a difference."""
    if len(runs) > 1 and min(runs) < least_pairs:
        typer.echo(
            f"note: below {least_pairs} pairs of runs it cannot be told which label is better; repeat both in turn",
            err=True,
        )
