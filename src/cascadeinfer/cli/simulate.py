"""
`cascadeinfer simulate`: one workload under several policies, side by side.

For each seed, every policy gets the same requests at the same times. Lengths are drawn with replacement from the trace,
and arrivals are Poisson at the given rate unless --arrivals says otherwise. All figures are simulated; the cost profile
documents the basis of its step times.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascadeinfer.cli import experiment_options as options

if TYPE_CHECKING:
    from cascadeinfer.evaluation.runs import RunOutcome, RunSpec
    from cascadeinfer.evaluation.setting import Setting

DEFAULT_REQUESTS = 2000


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(simulate)


def simulate(
    *,
    profile: options.Profile,
    trace: options.TraceFile,
    rate: options.Rate,
    instances: options.Instances,
    policy: options.Policies = options.DEFAULT_POLICIES,
    seeds: options.Seeds = 3,
    requests: options.Requests = None,
    duration_s: options.DurationS = None,
    warm_up: options.WarmUp = 0.1,
    objective: options.ObjectiveName = None,
    margin: options.Margin = options.DEFAULT_MARGIN,
    ttft_slo: options.TtftSlo = 2.0,
    tpot_slo: options.TpotSlo = 0.1,
    context: options.Context = options.DEFAULT_CONTEXT,
    accept_poor_profile: options.AcceptPoorProfile = False,
    arrivals: options.Arrivals = "poisson",
    prefix_caching: options.PrefixCaching = False,
    prefix_hashes: options.PrefixHashes = None,
    precopy: options.Precopy = False,
    max_num_batched_tokens: options.TokenBudgets = None,
    overload: options.Overload = False,
    jobs: options.Jobs = 1,
    plot: options.PlotPrefix = None,
    event_log: options.EventLogFile = None,
    json_file: options.JsonFile = None,
    parquet: Annotated[Path | None, typer.Option(help="Write one row per request, policy and seed (Parquet).")] = None,
) -> None:
    """Simulate a workload under several policies, by default 2,000 requests per run, and compare them."""
    from cascadeinfer.evaluation.pool import check_jobs
    from cascadeinfer.evaluation.runs import RunSpec
    from cascadeinfer.evaluation.setting import check_rate, check_served
    from cascadeinfer.evaluation.variants import check_policies

    check_policies(names := options.words_of(policy))
    check_rate(rate)
    options.share(warm_up, "--warm-up")
    count = options.requests_of(requests, duration_s, rate, default=DEFAULT_REQUESTS)
    options.at_least_one(seeds=seeds)
    check_jobs(jobs)
    drawn = None if plot is None else Path(plot)
    files = {"--plot": drawn, "--event-log": event_log, "--json": json_file, "--parquet": parquet}
    options.check_outputs(files, matplotlib=plot is not None, pyarrow=parquet is not None)
    goal = options.objective_of(objective, slo := options.slo_of(ttft_slo, tpot_slo))
    budgets = options.token_budgets_of(max_num_batched_tokens)
    setting = options.setting_of(profile, trace, instances, context, goal, margin, accept_poor_profile, prefix_hashes)
    prefixes = options.prefixes_of(setting, prefix_caching, prefix_hashes)
    if not overload:
        check_served(setting, [rate], budgets)
    law = options.arrivals_of(arrivals)
    first = RunSpec(names[0], rate, 0, count, slo, warm_up, 0.0, overload, law, prefixes, precopy=precopy)
    specs = _specs(first, names, budgets, seeds)
    outcomes = _run_all([_task_of(setting, spec, plot, event_log, len(specs)) for spec in specs], jobs)
    options.tell_notes(setting)
    options.tell_short_runs(rate, count, max(o.summary.e2e_s_mean for o in outcomes))
    runs = _by_label(outcomes)
    title = f"{setting.profile.name}, {trace.name}, {rate:g} requests/s, {instances} instances, {count} requests"
    _show(runs, names, budgets, title)
    _write(_content(setting, trace, first, seeds, budgets), runs, json_file, parquet)
    if plot is not None:
        _draw(plot, runs, title)


def _task_of(setting: "Setting", spec: "RunSpec", plot: str | None, event_log: Path | None, n_runs: int) -> "_Task":
    """One run; the first seed's is drawn."""
    return _Task(setting, spec, plot is not None and spec.seed == 0, _log_of(event_log, spec, n_runs))


def _specs(first: "RunSpec", names: Sequence[str], budgets: Sequence[int | None], seeds: int) -> list["RunSpec"]:
    """Every policy at every token budget, seed by seed."""
    return [
        replace(first, policy=name, seed=seed, max_batched_tokens=budget)
        for seed in range(seeds)
        for name in names
        for budget in budgets
    ]


def _by_label(outcomes: Sequence["RunOutcome"]) -> dict[str, list["RunOutcome"]]:
    """The runs of each policy at each token budget, in order of seed."""
    runs: dict[str, list[RunOutcome]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.spec.label, []).append(outcome)
    return runs


def _show(runs: dict[str, list["RunOutcome"]], names: Sequence[str], budgets: Sequence[int | None], title: str) -> None:
    """Print the tables, and with several token budgets the best one of each policy."""
    from cascadeinfer.cli.tables import console, policy_tables, tell_best_budgets

    summaries = {label: [outcome.summary for outcome in done] for label, done in runs.items()}
    for table in policy_tables(summaries, title):
        console().print(table)
    if len(budgets) > 1:
        typer.echo(tell_best_budgets(summaries, names, budgets))


@dataclass(frozen=True)
class _Task:
    """A run as a value that can be sent to another process."""

    setting: "Setting"
    spec: "RunSpec"
    keep_samples: bool
    event_log: Path | None

    def run(self, progress: Callable[[float, int], None] | None = None) -> "RunOutcome":
        """Run it."""
        from cascadeinfer.evaluation.runs import run_once

        return run_once(
            self.setting, self.spec, keep_samples=self.keep_samples, progress=progress, event_log=self.event_log
        )


def _log_of(event_log: Path | None, spec: "RunSpec", n_runs: int) -> Path | None:
    """The event log file of one run."""
    if event_log is None or n_runs == 1:
        return event_log
    stem, dot, suffixes = event_log.name.partition(".")
    return event_log.with_name(f"{stem}-{_in_file_name(spec.label)}-{spec.seed}{dot}{suffixes}")


def _in_file_name(label: str) -> str:
    return label.replace(" @", "-")


def _do(task: _Task) -> "RunOutcome":
    return task.run()


def _run_all(tasks: Sequence[_Task], jobs: int) -> list["RunOutcome"]:
    """Run all tasks; the results are in order."""
    from cascadeinfer.cli.tables import progress_bar
    from cascadeinfer.evaluation.pool import map_in_processes

    outcomes: dict[int, RunOutcome] = {}
    with progress_bar() as progress:
        bar = progress.add_task("simulating", total=sum(task.spec.requests for task in tasks))
        if jobs > 1:
            for number, outcome in map_in_processes(_do, tasks, jobs):
                outcomes[number] = outcome
                progress.advance(bar, outcome.spec.requests)
            return [outcomes[i] for i in range(len(tasks))]
        done = 0
        for number, task in enumerate(tasks):
            progress.update(bar, description=f"{task.spec.label}, seed {task.spec.seed}")

            def tell(_: float, over: int, before: int = done) -> None:
                progress.update(bar, completed=before + over)

            outcomes[number] = task.run(tell)
            done += task.spec.requests
            progress.update(bar, completed=done)
    return [outcomes[i] for i in range(len(tasks))]


def _content(
    setting: "Setting", trace: Path, spec: "RunSpec", seeds: int, budgets: Sequence[int | None]
) -> dict[str, Any]:
    from cascadeinfer.results.provenance import provenance

    return {
        "provenance": provenance(setting.profile, range(seeds)),
        "trace": str(trace),
        "rate_per_s": spec.rate_rps,
        "instances": setting.n_instances,
        "requests": spec.requests,
        "warm_up": spec.warm_up,
        "arrivals": asdict(spec.arrivals),
        "prefix_caching": spec.prefix_caching,
        "precopy": spec.precopy,
        "max_num_batched_tokens": [b or setting.profile.capacity.max_batched_tokens for b in budgets],
        "context_tokens": setting.context_tokens,
        "prompts_cut": setting.capped.prompts_cut,
        "outputs_cut": setting.capped.outputs_cut,
        "slo": asdict(spec.slo),
    }


def _write(
    header: dict[str, Any], runs: dict[str, list["RunOutcome"]], json_file: Path | None, parquet: Path | None
) -> None:
    if json_file is not None:
        options.write_json(
            json_file, {**header, "runs": {name: [_figures(o) for o in per_seed] for name, per_seed in runs.items()}}
        )
    if parquet is not None:
        _write_parquet(parquet, [outcome for per_seed in runs.values() for outcome in per_seed], header)


def _figures(outcome: "RunOutcome") -> dict[str, Any]:
    layouts = [_layout(since_s, layout) for since_s, layout in outcome.layouts]
    return {"seed": outcome.spec.seed, **asdict(outcome.summary), "end_s": outcome.end_s, "layouts": layouts}


def _layout(since_s: float, layout: Any) -> dict[str, Any]:
    return {
        "since_s": since_s,
        "boundaries_tokens": list(layout.boundaries_tokens),
        "instances": [len(stage.instance_ids) for stage in layout.stages],
    }


def _write_parquet(file: Path, outcomes: Sequence["RunOutcome"], header: dict[str, Any]) -> None:
    """Write the columns of `RequestRecords` with policy and seed; the schema's metadata holds the provenance."""
    import json
    from dataclasses import fields

    import pyarrow as pa
    import pyarrow.parquet as pq

    from cascadeinfer.results.output_files import replacing

    tables = []
    for outcome in outcomes:
        n = len(outcome.requests)
        columns = {
            "policy": pa.array([outcome.spec.label] * n).dictionary_encode(),
            "seed": pa.array([outcome.spec.seed] * n),
        }
        columns |= {f.name: pa.array(getattr(outcome.requests, f.name)) for f in fields(outcome.requests)}
        tables.append(pa.table(columns))
    metadata = {"cascadeinfer": json.dumps(header)}
    table = pa.concat_tables(tables, promote_options="default").unify_dictionaries().replace_schema_metadata(metadata)
    with replacing(file, "--parquet") as beside:
        pq.write_table(table, beside)


def _draw(prefix: str, runs: dict[str, list["RunOutcome"]], title: str) -> None:
    """Plot the distributions over all seeds, and the first seed's timelines."""
    from cascadeinfer.figures.drawing import latency_cdfs, save
    from cascadeinfer.figures.timelines import stage_timelines

    save(
        latency_cdfs({name: [o.counted for o in per_seed] for name, per_seed in runs.items()}, f"{title} (simulated)"),
        Path(f"{prefix}-cdf.png"),
    )
    for name, per_seed in runs.items():
        first = per_seed[0]
        if first.samples is not None and len(first.samples):
            save(
                stage_timelines(first.samples, first.layouts, f"{name}: {title}"),
                Path(f"{prefix}-timeline-{_in_file_name(name)}.png"),
            )
