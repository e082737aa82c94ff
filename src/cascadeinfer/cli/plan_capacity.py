"""`plan --slo`: options, table and answer of the search for the fewest instances (`evaluation/capacity.py`)."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

from cascadeinfer.cli import experiment_options as options
from cascadeinfer.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from cascadeinfer.evaluation.capacity import Capacity, CapacitySearch
    from cascadeinfer.evaluation.runs import RunSpec
    from cascadeinfer.evaluation.setting import Setting
    from cascadeinfer.results.summary import Slo


def percentile_of(text: str | None, instances: int | None) -> float | None:
    """
    The percentile of `--slo`, e.g. 99.0 of `p99`; None when the number of instances is given instead.

    Raises:
        ConfigError: Both or neither are given, or the text is no percentile.
    """
    if text is None:
        if instances is None:
            raise ConfigError("say how many instances, or which SLO to keep", option="--instances", fix="or --slo p99")
        return None
    if instances is not None:
        raise ConfigError(
            "the number of instances is either given or searched for", option="--slo", fix="leave one out"
        )
    try:
        percentile = float(text.removeprefix("p"))
    except ValueError:
        percentile = 0.0
    if not (text.startswith("p") and 0.0 < percentile < 100.0):
        raise ConfigError(f"{text!r} is no percentile", option="--slo", fix="e.g. p50, p90, p99 or p99.9")
    return percentile


def run_of(policy: str, rate_rps: float, duration_s: float, slo: "Slo", warm_up: float) -> "RunSpec":
    """
    The run that the options ask for.

    Raises:
        ConfigError: An option is out of bounds.
    """
    from cascadeinfer.evaluation.runs import RunSpec
    from cascadeinfer.evaluation.variants import check_policies

    check_policies([policy])
    options.share(warm_up, "--warm-up")
    count = options.requests_of(None, duration_s, rate_rps, default=1)
    return RunSpec(policy, rate_rps, 0, count, slo, warm_up, allow_overload=True)


def search_of(setting: "Setting", run: "RunSpec", percentile: float, seeds: int, most: int) -> "CapacitySearch":
    """
    The search that the options ask for.

    Raises:
        ConfigError: An option is out of bounds.
    """
    from cascadeinfer.evaluation.capacity import CapacitySearch

    options.at_least_one(seeds=seeds, most_instances=most)
    return CapacitySearch(setting, run, percentile, seeds, most)


def answered(search: "CapacitySearch", jobs: int) -> tuple["Setting", dict[str, Any]]:
    """
    Search and print the answer.

    Returns:
        The setting with the number of instances found, and what belongs into a JSON file.

    Raises:
        ConfigError: No number of instances keeps the SLO, or there are not so many processors.
    """
    from cascadeinfer.cli.tables import console

    found = find(search, jobs)
    console().print(table_of(search, found))
    typer.echo(answer_of(search, found))
    slowest_s = next(tried.e2e_s for tried in found.tried if tried.instances == found.instances)
    options.tell_short_runs(search.spec.rate_rps, search.spec.requests, slowest_s)
    return replace(search.setting, n_instances=found.instances), {"slo": content_of(search, found)}


def find(search: "CapacitySearch", jobs: int) -> "Capacity":
    """
    Search, with a progress bar.

    Raises:
        ConfigError: No number of instances keeps the SLO, or there are not so many processors.
    """
    from cascadeinfer.cli.tables import progress_bar
    from cascadeinfer.evaluation.pool import check_jobs

    check_jobs(jobs)
    with progress_bar() as progress:
        bar = progress.add_task("simulating", total=None)
        return search.fewest(jobs, lambda: progress.advance(bar))


def table_of(search: "CapacitySearch", found: "Capacity") -> "Table":
    """The numbers of instances that were simulated."""
    from rich.table import Table

    from cascadeinfer.cli.tables import shown

    slo, name = search.spec.slo, f"p{search.percentile:g}"
    meaning = "s: mean ±95 % confidence" if search.seeds > 1 else ""
    table = Table(
        title=f"{search.spec.policy}, {search.spec.rate_rps:g} requests/s, {search.spec.requests} requests",
        caption=f"simulated; {search.seeds} seed{meaning}",
    )
    for heading in (
        "instances",
        f"TTFT {name} s, limit {slo.ttft_s:g}",
        f"TPOT {name} s, limit {slo.tpot_s:g}",
        "kept",
    ):
        table.add_column(heading, justify="right")
    for tried in found.tried:
        table.add_row(str(tried.instances), shown(tried.ttft_s), shown(tried.tpot_s), "yes" if tried.keeps else "no")
    return table


def answer_of(search: "CapacitySearch", found: "Capacity") -> str:
    """The answer in words: what is simulated, what is predicted, how exact it is."""
    slo, n, rate = search.spec.slo, found.instances, search.spec.rate_rps
    fewer = f"{n - 1} miss it" if n > found.predicted else "fewer were not tried"
    return (
        f"fewest instances with p{search.percentile:g} of TTFT within {slo.ttft_s:g} s and of TPOT within "
        f"{slo.tpot_s:g} s: {n}\n"
        f"simulated: {n} keep the SLO at {rate:g} requests/s, {rate / n:.3g} per instance; {fewer}\n"
        f"predicted: {found.predicted} carry the rate in steady state; on fewer, queues would grow without end\n"
    )


def content_of(search: "CapacitySearch", found: "Capacity") -> dict[str, Any]:
    """The same for JSON."""
    return {
        **asdict(search.spec.slo),
        "percentile": search.percentile,
        "policy": search.spec.policy,
        "seeds": search.seeds,
        "requests": search.spec.requests,
        "warm_up": search.spec.warm_up,
        "most_instances": search.most,
        "fewest_instances": found.instances,
        "rate_per_instance_rps": search.spec.rate_rps / found.instances,
        "predicted_instances_for_the_rate": found.predicted,
        "simulated": [asdict(tried) for tried in found.tried],
    }
