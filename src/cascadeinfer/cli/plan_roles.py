"""`cascadeinfer plan --roles`: prefill stages, stages that decode and chunk budgets in one plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascadeinfer.cli import experiment_options as options
from cascadeinfer.core.errors import ConfigError

if TYPE_CHECKING:
    from cascadeinfer.core.plan.role_plan import RolePlan, RoleStage
    from cascadeinfer.evaluation.setting import Setting


WithRoles = Annotated[
    bool,
    typer.Option(
        "--roles",
        help="Also plan prefill stages and chunk budgets (--max-num-batched-tokens).",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--max-num-batched-tokens",
        help="With --roles: the chunk budgets to choose from. Default: 512,1024,2048,8192 and the profile's.",
    ),
]


def check(*, roles: bool, budgets: str | None, slo: str | None, plot: Path | None) -> None:
    """
    Refuse options that contradict each other.

    Raises:
        ConfigError: Budgets without `--roles`, or `--roles` with an option that plans without them.
    """
    if not roles and budgets is not None:
        raise ConfigError(
            "chunk budgets are chosen by plans with roles", option="--max-num-batched-tokens", fix="--roles"
        )
    for value, option in ((slo, "--slo"), (plot, "--plot")):
        if roles and value is not None:
            raise ConfigError(f"{option} knows no roles", option="--roles", fix="leave one of them out")


def plan_roles(setting: "Setting", rate_rps: float, budgets: str | None, json_file: Path | None) -> None:
    """
    Plan, explain, and write the JSON file if one is wanted.

    Raises:
        ConfigError: A budget is no whole number of at least 1.
        PlanError: The rate is above the capacity of every plan.
    """
    from cascadeinfer.core.plan.explain_roles import explain_roles

    given = [budget for budget in options.token_budgets_of(budgets) if budget is not None]
    choices = tuple(sorted(given)) or setting.role_budgets()
    best = setting.plan_roles(rate_rps, choices)
    options.tell_notes(setting)
    typer.echo("\n".join(explain_roles(best, choices)))
    typer.echo(f"\nfor the server: {_for_the_server(best)}")
    if json_file is not None:
        options.write_json(json_file, _content(setting, best, rate_rps, choices))


def _for_the_server(best: "RolePlan") -> str:
    """Options to copy."""
    from cascadeinfer.config.stages import WantedStage, text_of
    from cascadeinfer.core.layout import StageKind

    stages = text_of(
        [
            WantedStage(stage.kind is StageKind.PREFILL, stage.range, stage.n_instances, stage.budget_tokens)
            for stage in best.every
        ]
    )
    most = max(stage.budget_tokens for stage in best.every)
    n_instances = sum(stage.n_instances for stage in best.every)
    return f"--instances {n_instances} --max-num-batched-tokens {most} --policy roles --stages {stages}"


def _content(setting: "Setting", best: "RolePlan", rate_rps: float, budgets: tuple[int, ...]) -> dict[str, Any]:
    from cascadeinfer.results.provenance import provenance

    return {
        "provenance": provenance(setting.profile, []),
        "rate_per_s": rate_rps,
        "instances": setting.n_instances,
        "context_tokens": setting.context_tokens,
        "max_num_batched_tokens": list(budgets),
        "stages": [_as_dict(stage) for stage in (*best.prefill, *best.stages)],
        "predicted": best.cost,
        "predicted_without_prefill": best.without_prefill_cost,
    }


def _as_dict(stage: "RoleStage") -> dict[str, Any]:
    from cascadeinfer.core.types import UNBOUNDED_TOKENS

    hi = stage.range.hi_tokens
    return {
        "kind": stage.kind.value,
        "lo_tokens": stage.range.lo_tokens,
        "hi_tokens": None if hi >= UNBOUNDED_TOKENS else hi,
        "instances": stage.n_instances,
        "max_num_batched_tokens": stage.budget_tokens,
        **stage.service._asdict(),
    }
