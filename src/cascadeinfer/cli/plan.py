"""`cascadeinfer plan`: the best stages for a workload, with reasons."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(plan)


def plan(
    *,
    profile: Annotated[str, typer.Option(help="Cost profile: a shipped name or a JSON file.")],
    trace: Annotated[Path, typer.Option(help="Trace file (.csv or .jsonl, also .gz); its lengths count.")],
    rate: Annotated[float, typer.Option(help="Requests per second.")],
    instances: Annotated[int, typer.Option(help="Instances to place.")],
    margin: Annotated[float, typer.Option(help="Gain that several stages must bring over one.")] = 0.05,
    context: Annotated[int, typer.Option(help="Longest sequence; longer requests are cut, and counted.")] = 131_072,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan here.")] = None,
) -> None:
    """Plan stages for the lengths of a trace at a rate, and say why."""
    from cascadeinfer.cli.workload_options import load_workload
    from cascadeinfer.core.plan.explain import explain

    workload = load_workload(profile, trace, rate, instances, context)
    best = workload.plan(margin)
    for note in workload.notes():
        typer.echo(f"note: {note}", err=True)
    typer.echo(explain(best))
    boundaries = (0, *best.boundaries_tokens)
    ends = (*best.boundaries_tokens, None)
    stages: list[dict[str, Any]] = [
        {"lo_tokens": lo, "hi_tokens": hi, "instances": n}
        for lo, hi, n in zip(boundaries, ends, best.instances, strict=True)
    ]
    flag = ",".join(f"{s['lo_tokens']}-{s['hi_tokens'] or ''}:{s['instances']}" for s in stages)
    typer.echo(f"\nfor the server: --instances {instances} --stages {flag}")
    if json_file is not None:
        content = {
            "profile": workload.profile.name,
            "trace": str(trace),
            "rate_per_s": rate,
            "stages": stages,
            "predicted": best.cost,
            "predicted_one_stage": best.one_stage_cost,
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n")
