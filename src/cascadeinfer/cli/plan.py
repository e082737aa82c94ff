"""`cascadeinfer plan`: the best stages for a workload, with reasons."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascadeinfer.cli import experiment_options as options
from cascadeinfer.cli import plan_roles as role_options

if TYPE_CHECKING:
    from rich.table import Table

    from cascadeinfer.core.plan.planner import Plan, StagePrediction
    from cascadeinfer.evaluation.setting import Setting


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(plan)


def plan(
    *,
    profile: options.Profile,
    trace: options.TraceFile,
    rate: options.Rate,
    instances: Annotated[int | None, typer.Option(help="Instances of the model.")] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help=(
                "Instead of --instances: find the fewest at which this percentile of TTFT is within --ttft-slo, and "
                "that of TPOT within --tpot-slo, e.g. p99."
            )
        ),
    ] = None,
    objective: options.ObjectiveName = None,
    margin: options.Margin = options.DEFAULT_MARGIN,
    ttft_slo: options.TtftSlo = 2.0,
    tpot_slo: options.TpotSlo = 0.1,
    context: options.Context = options.DEFAULT_CONTEXT,
    accept_poor_profile: options.AcceptPoorProfile = False,
    roles: role_options.WithRoles = False,
    max_num_batched_tokens: role_options.Budgets = None,
    policy: Annotated[str, typer.Option(help="With --slo: the policy that is simulated.")] = options.SLO_POLICY,
    seeds: Annotated[int, typer.Option(help="With --slo: runs per number of instances.")] = 2,
    duration_s: Annotated[float, typer.Option(help="With --slo: seconds of arrivals per run.")] = 60.0,
    warm_up: options.WarmUp = 0.1,
    most_instances: Annotated[int, typer.Option(help="With --slo: largest number to try.")] = 256,
    jobs: options.Jobs = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw work over length with the stages (PNG).")] = None,
    json_file: options.JsonFile = None,
) -> None:
    """Plan stages for the lengths of a trace at a rate, and say why; with --slo, first find how many instances."""
    from cascadeinfer.cli import plan_capacity
    from cascadeinfer.evaluation.setting import check_rate

    goal = options.objective_of(objective, limits := options.slo_of(ttft_slo, tpot_slo))
    check_rate(rate)
    percentile = plan_capacity.percentile_of(slo, instances)
    options.check_outputs({"--plot": plot, "--json": json_file}, matplotlib=plot is not None)
    role_options.check(roles=roles, budgets=max_num_batched_tokens, slo=slo, plot=plot)
    count = 1 if instances is None else instances
    setting = options.setting_of(profile, trace, count, context, goal, margin, accept_poor_profile)
    if roles:
        role_options.plan_roles(setting, rate, max_num_batched_tokens, json_file)
        return
    searched: dict[str, Any] = {}
    if percentile is not None:
        run = plan_capacity.run_of(policy, rate, duration_s, limits, warm_up)
        search = plan_capacity.search_of(setting, run, percentile, seeds, most_instances)
        setting, searched = plan_capacity.answered(search, jobs)
    best = setting.plan(rate)
    options.tell_notes(setting)
    _tell(best, setting.n_instances, profile)
    stages = [_as_dict(stage) for stage in best.stages]
    if json_file is not None:
        options.write_json(json_file, {**_content(setting, best, rate, stages), **searched})
    if plot is not None:
        from cascadeinfer.figures.drawing import save
        from cascadeinfer.figures.plan_figure import plan_figure

        save(plan_figure(best, f"{setting.profile.name}, {trace.name}, {rate:g} requests/s"), plot)


def _tell(best: "Plan", instances: int, profile: str) -> None:
    """Print the plan, the reasons for it, and the options of a server that starts with it."""
    from cascadeinfer.cli.tables import console
    from cascadeinfer.core.plan.explain import reasons

    out = console()
    out.print(_stage_table(best))
    out.print(_comparison(best), highlight=False, soft_wrap=True)
    typer.echo("\n".join(["", *reasons(best)]))
    typer.echo(f"\n{_for_the_server(best, instances, profile)}")


def _stage_table(best: "Plan") -> "Table":
    from rich.table import Table

    table = Table(title=f"{len(best.stages)} stage{'s' if len(best.stages) > 1 else ''}, predicted")
    for heading in (
        "lengths", "instances", "requests", "tokens", "busy", "batch", "step\nms", "KV\nuse", "TTFT\ns",
        "handed\nin/s",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=heading == "lengths")
    for stage in best.stages:
        service = stage.service
        table.add_row(
            str(stage.range),
            str(stage.n_instances),
            f"{stage.share_of_requests:.1%}",
            f"{stage.share_of_steps:.1%}",
            f"{service.utilisation:.0%}",
            f"{service.batch:.1f}",
            f"{1e3 * service.step_s:.2f}",
            f"{service.kv_use:.0%}",
            f"{service.ttft_s:.3f}",
            f"{stage.hand_overs_per_s:.2f}",
        )
    return table


def _for_the_server(best: "Plan", instances: int, profile: str) -> str:
    """Options to copy. Those that keep planning active come first, because `--stages` fixes the stages for good."""
    plans_itself = f"for the server: --instances {instances} --profile {profile}"
    if len(best.stages) == 1:
        return f"{plans_itself} (it starts with one stage and plans again as it sees the workload)"
    flag = ",".join(f"{stage.range}:{stage.n_instances}" for stage in best.stages)
    return (
        f"{plans_itself} (plans again as it sees the workload)\n"
        f"or with these stages, fixed: --instances {instances} --stages {flag}"
    )


def _comparison(best: "Plan") -> str:
    """Predicted QoE of the plan and of a single stage."""
    describe = best.problem.objective.describe
    one = describe(best.one_stage_cost) if math.isfinite(best.one_stage_cost) else "cannot carry the load"
    return f"predicted: this plan {describe(best.cost)}; one stage {one}"


def _as_dict(stage: "StagePrediction") -> dict[str, Any]:
    from cascadeinfer.core.types import UNBOUNDED_TOKENS

    hi = stage.range.hi_tokens
    return {
        "lo_tokens": stage.range.lo_tokens,
        "hi_tokens": None if hi >= UNBOUNDED_TOKENS else hi,
        "instances": stage.n_instances,
        "share_of_requests": stage.share_of_requests,
        "share_of_steps": stage.share_of_steps,
        "share_of_work": stage.share_of_work,
        "hand_overs_per_s": stage.hand_overs_per_s,
        **stage.service._asdict(),
    }


def _content(setting: "Setting", best: "Plan", rate_rps: float, stages: list[dict[str, Any]]) -> dict[str, Any]:
    from cascadeinfer.results.provenance import provenance

    return {
        "provenance": provenance(setting.profile, []),
        "rate_per_s": rate_rps,
        "instances": setting.n_instances,
        "context_tokens": setting.context_tokens,
        "prompts_cut": setting.capped.prompts_cut,
        "outputs_cut": setting.capped.outputs_cut,
        "stages": stages,
        "predicted": best.cost,
        "predicted_one_stage": best.one_stage_cost,
        "predicted_by_stages": best.cost_by_stages,
    }
