"""
`cascadeinfer simulate`: one workload through several policies, side by side.

Every policy sees the same requests at the same times for each seed. Lengths are drawn with replacement from the trace and arrivals are
Poisson at the given rate. All figures are simulated; the cost profile says what its step times rest on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from cascadeinfer.cli.workload_options import Workload
    from cascadeinfer.core.policy import Policy
    from cascadeinfer.observe.summary import RunSummary

COLUMNS = (
    ("TTFT s", "ttft_s_mean"),
    ("TPOT s", "tpot_s_mean"),
    ("norm. latency s", "normalised_latency_s_mean"),
    ("e2e mean s", "e2e_s_mean"),
    ("e2e p99 s", "e2e_s_p99"),
    ("tokens/s", "throughput_tokens_per_s"),
    ("SLO", "slo_attainment"),
    ("moves", "migrations"),
    ("preempted", "preemptions"),
)


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(simulate)


def simulate(
    *,
    profile: Annotated[str, typer.Option(help="Cost profile: a shipped name or a JSON file.")],
    trace: Annotated[Path, typer.Option(help="Trace file (.csv or .jsonl, also .gz); its lengths count.")],
    rate: Annotated[float, typer.Option(help="Requests per second.")],
    instances: Annotated[int, typer.Option(help="Instances.")],
    policy: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "cascade,least_loaded,round_robin",
    seeds: Annotated[int, typer.Option(help="Runs per policy, with seeds 0, 1, ...")] = 3,
    requests: Annotated[int, typer.Option(help="Requests per run.")] = 2000,
    ttft_slo: Annotated[float, typer.Option(help="SLO: most seconds to the first token.")] = 2.0,
    tpot_slo: Annotated[float, typer.Option(help="SLO: most seconds per token after it.")] = 0.1,
    margin: Annotated[float, typer.Option(help="Gain that several stages must bring over one.")] = 0.05,
    context: Annotated[int, typer.Option(help="Longest sequence; longer requests are cut, and counted.")] = 131_072,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every run's figures here.")] = None,
) -> None:
    """Simulate a workload under several policies and compare them."""
    from rich.console import Console

    from cascadeinfer import __version__
    from cascadeinfer.cli.workload_options import load_workload
    from cascadeinfer.core.errors import ConfigError
    from cascadeinfer.core.policies import POLICIES

    names = [name.strip() for name in policy.split(",")]
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"no policy {name!r}", option="--policy", fix=f"one of {', '.join(sorted(POLICIES))}")
    for value, option in ((seeds, "--seeds"), (requests, "--requests")):
        if value < 1:
            raise ConfigError(f"{value} is not at least 1", option=option)
    workload = load_workload(profile, trace, rate, instances, context)
    runs = _run_all(workload, names, seeds, requests, (ttft_slo, tpot_slo), margin)
    for note in workload.notes():
        typer.echo(f"note: {note}", err=True)
    Console(width=None if sys.stdout.isatty() else 160).print(_table(runs))
    if json_file is not None:
        content = {
            "simulated": True,
            "version": __version__,
            "profile": workload.profile.name,
            "trace": str(trace),
            "rate_per_s": rate,
            "instances": instances,
            "requests": requests,
            "slo": {"ttft_s": ttft_slo, "tpot_s": tpot_slo},
            "runs": {name: [asdict(run) for run in per_seed] for name, per_seed in runs.items()},
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n")


def _run_all(
    workload: "Workload", names: Sequence[str], seeds: int, requests: int, slo: tuple[float, float], margin: float
) -> dict[str, list["RunSummary"]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    runs: dict[str, list[RunSummary]] = {name: [] for name in names}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(names) * seeds * requests)
        for seed in range(seeds):
            for name in names:
                done_before = progress.tasks[task].completed

                def tell(_: float, over: int, before: float = done_before) -> None:
                    progress.update(task, completed=before + over)

                runs[name].append(_run(workload, name, seed, requests, slo, margin, tell))
                progress.update(task, completed=done_before + requests)
    return runs


def _run(
    workload: "Workload",
    name: str,
    seed: int,
    requests: int,
    slo: tuple[float, float],
    margin: float,
    tell: Any,
) -> "RunSummary":
    import numpy as np

    from cascadeinfer.observe.summary import Slo, summarise
    from cascadeinfer.sim.run import simulate as run_simulation
    from cascadeinfer.sim.settings import NetworkConfig, SimConfig
    from cascadeinfer.workload.arrivals import poisson_arrivals

    rng = np.random.default_rng(seed)
    lengths = workload.trace.resample(requests, rng)
    trace = lengths.with_arrivals(poisson_arrivals(workload.rate_per_s, requests, rng))
    profile = workload.profile
    config = SimConfig(
        instances=workload.n_instances,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=workload.context_tokens,
        network=NetworkConfig(link_bytes_per_s=profile.transfer_bytes_per_s),
        seed=seed,
    )
    result = run_simulation(trace, _policy(workload, name, margin), config, progress=tell)
    return summarise(result.requests, result.end_s, Slo(*slo))


def _policy(workload: "Workload", name: str, margin: float) -> "Policy":
    """A fresh policy; those with stages start with the planned ones."""
    from cascadeinfer.core.policies import POLICIES
    from cascadeinfer.sim.settings import instance_ids

    if name not in {"cascade", "static_stages"}:
        return POLICIES[name]()
    layout = workload.plan(margin).layout(instance_ids(workload.n_instances))
    if name == "cascade":
        return POLICIES[name](layout=layout, step_model=workload.profile.step_model)
    return POLICIES[name](layout=layout)


def _table(runs: dict[str, list["RunSummary"]]) -> "Table":
    from rich.table import Table

    from cascadeinfer.observe.summary import interval

    table = Table(title="simulated; mean over seeds +- 95 % confidence", caption="lower is better up to e2e")
    table.add_column("policy")
    for heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for name, per_seed in runs.items():
        table.add_row(name, *(str(interval([getattr(run, field) for run in per_seed])) for _, field in COLUMNS))
    return table
