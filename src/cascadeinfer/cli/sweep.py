"""
`cascadeinfer sweep`: policies over a range of rates, and the highest rate at which each keeps an SLO.

Rates above capacity are run too, because that is where the curves turn up. Plans are then made for what could be
served.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cascadeinfer.cli import experiment_options as options

if TYPE_CHECKING:
    from rich.table import Table

    from cascadeinfer.evaluation.search import HighestRate
    from cascadeinfer.evaluation.sweeps import Contender, Curves, Sweep
    from cascadeinfer.results.summary import Slo

DEFAULT_DURATION_S: Final = 60.0


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(sweep)


def sweep(
    *,
    profile: options.Profile,
    trace: options.TraceFile,
    rates: Annotated[str, typer.Option(help="Requests per second: lo:hi:n, or a list with commas.")],
    instances: options.Instances,
    policy: options.Policies = options.DEFAULT_POLICIES,
    seeds: options.Seeds = 2,
    requests: options.Requests = None,
    duration_s: options.DurationS = None,
    warm_up: options.WarmUp = 0.1,
    objective: options.ObjectiveName = None,
    margin: options.Margin = options.DEFAULT_MARGIN,
    ttft_slo: options.TtftSlo = 2.0,
    tpot_slo: options.TpotSlo = 0.1,
    attain: Annotated[float, typer.Option(help="Share of requests that must keep the SLO.")] = 0.9,
    bisections: Annotated[int, typer.Option(help="Halvings in the search for the highest rate; 0 leaves it out.")] = 6,
    context: options.Context = options.DEFAULT_CONTEXT,
    accept_poor_profile: options.AcceptPoorProfile = False,
    arrivals: options.Arrivals = "poisson",
    max_num_batched_tokens: options.TokenBudgets = None,
    jobs: options.Jobs = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves (PNG).")] = None,
    json_file: options.JsonFile = None,
) -> None:
    """Simulate policies over rates, by default for 60 s each; find the highest rate that keeps an SLO."""
    from cascadeinfer.cli.tables import console
    from cascadeinfer.evaluation.pool import check_jobs
    from cascadeinfer.evaluation.runs import RunSpec
    from cascadeinfer.evaluation.sweeps import Contender, Sweep
    from cascadeinfer.evaluation.variants import check_policies

    check_policies(names := options.words_of(policy))
    wanted = options.rates_of(rates)
    options.share(warm_up, "--warm-up")
    options.share(attain, "--attain")
    options.at_least_one(seeds=seeds)
    options.not_negative(bisections=bisections)
    span_s = DEFAULT_DURATION_S if requests is None and duration_s is None else duration_s
    count = options.requests_of(requests, span_s, wanted[0], default=1)
    check_jobs(jobs)
    options.check_outputs({"--plot": plot, "--json": json_file}, matplotlib=plot is not None)
    budgets = options.token_budgets_of(max_num_batched_tokens)
    slo = options.slo_of(ttft_slo, tpot_slo)
    goal = options.objective_of(objective, slo)
    setting = options.setting_of(profile, trace, instances, context, goal, margin, accept_poor_profile)
    law = options.arrivals_of(arrivals)
    spec = RunSpec(names[0], wanted[0], 0, count, slo, warm_up, allow_overload=True, arrivals=law)
    what = Sweep(setting, spec, seeds, span_s)
    contenders = [Contender(name, budget) for name in names for budget in budgets]
    curves, found = _run(what, contenders, wanted, attain, bisections, jobs)
    options.tell_notes(setting)
    title = f"{setting.profile.name}, {trace.name}, {instances} instances"
    tables = _curve_tables(curves, wanted, title)
    for table in [*tables, _rate_table(found, attain, slo, instances)] if found else tables:
        console().print(table)
    spans_s = [span_s if span_s is not None else count / rate for rate in wanted]
    _tell_short_runs(curves, wanted, spans_s)
    if json_file is not None:
        options.write_json(json_file, _content(what, trace, wanted, curves, found, attain))
    if plot is not None:
        _draw(plot, curves, wanted, title, spans_s)


def _draw(plot: Path, curves: "Curves", rates: Sequence[float], title: str, spans_s: Sequence[float]) -> None:
    from cascadeinfer.figures.drawing import save
    from cascadeinfer.figures.rate_figures import rate_curves

    save(rate_curves(curves, rates, title, spans_s), plot)


def _tell_short_runs(curves: "Curves", rates: Sequence[float], spans_s: Sequence[float]) -> None:
    """Note on standard error at which rates the runs of some policy were too short to be steady."""
    from cascadeinfer.results.summary import is_short

    short = []
    for number, (rate, span_s) in enumerate(zip(rates, spans_s, strict=True)):
        names = [name for name, curve in curves.items() if any(is_short(span_s, run) for run in curve[number])]
        if names:
            short.append(f"{rate:g}/s" if len(names) == len(curves) else f"{rate:g}/s ({', '.join(names)})")
    if short:
        typer.echo(
            f"note: at {', '.join(short)} requests took so long that in a run of {min(spans_s):.3g} s the cluster does "
            "not fill, or its queue has no end: these figures change with the length of the run (hollow in the plot); "
            "for steady ones raise --duration-s or --requests, or lower --rates",
            err=True,
        )


def _run(
    what: "Sweep", contenders: Sequence["Contender"], rates: Sequence[float], attain: float, bisections: int, jobs: int
) -> tuple["Curves", dict[str, "HighestRate"]]:
    from cascadeinfer.cli.tables import progress_bar
    from cascadeinfer.evaluation.sweeps import curves_of, highest_rates

    with progress_bar() as progress:
        bar = progress.add_task("curves", total=len(contenders) * len(rates) * what.seeds)
        curves = curves_of(what, contenders, rates, jobs, lambda: progress.advance(bar))
        if not bisections:
            return curves, {}
        search = progress.add_task("highest rates", total=len(contenders))
        found = highest_rates(
            what, contenders, curves, rates, attain, bisections, jobs, lambda: progress.advance(search)
        )
        return curves, found


def _curve_tables(curves: "Curves", rates: Sequence[float], title: str) -> list["Table"]:
    """For each rate, the policies' latencies and attainment."""
    from cascadeinfer.cli.tables import SWEEP_FIGURES, policy_table

    return [
        policy_table(
            {name: curve[i] for name, curve in curves.items()}, SWEEP_FIGURES, f"{title}, {rate:.5g} requests/s"
        )
        for i, rate in enumerate(rates)
    ]


def _rate_table(found: dict[str, "HighestRate"], attain: float, slo: "Slo", n_instances: int) -> "Table":
    """Highest rates, of all instances and of one (goodput), and where the search stopped."""
    from rich.table import Table

    table = Table(
        title=f"highest rate with {attain:.0%} of requests within TTFT {slo.ttft_s:g} s and TPOT {slo.tpot_s:g} s",
        caption="simulated; both rates were run: the limit lies between them",
    )
    table.add_column("policy", overflow="fold")
    for heading in ("requests/s", "per instance", "fails at"):
        table.add_column(heading, justify="right")
    for name, result in found.items():
        kept = [f"{result.rate_rps:.4g}", f"{result.rate_rps / n_instances:.4g}"] if result.rate_rps else ["none", "-"]
        failed = "not tried" if result.failed_rps is None else _failed(result.failed_rps, result.rate_rps)
        table.add_row(name, *kept, failed)
    return table


def _failed(failed_rps: float, kept_rps: float) -> str:
    return f"{failed_rps:.4g}" + (f" (+{failed_rps / kept_rps - 1.0:.1%})" if kept_rps else "")


def _content(
    what: "Sweep",
    trace: Path,
    rates: Sequence[float],
    curves: "Curves",
    found: dict[str, "HighestRate"],
    attain: float,
) -> dict[str, Any]:
    from cascadeinfer.results.provenance import provenance

    return {
        "provenance": provenance(what.setting.profile, range(what.seeds)),
        "trace": str(trace),
        "instances": what.setting.n_instances,
        "requests": what.spec.requests if what.duration_s is None else None,
        "duration_s": what.duration_s,
        "warm_up": what.spec.warm_up,
        "arrivals": asdict(what.spec.arrivals),
        "slo": {**asdict(what.spec.slo), "share": attain},
        "rates_per_s": list(rates),
        "curves": {name: [[asdict(run) for run in runs] for runs in curve] for name, curve in curves.items()},
        "highest_rate_per_s": {
            name: {**asdict(result), "per_instance_rps": result.rate_rps / what.setting.n_instances}
            for name, result in found.items()
        },
    }
