"""
Plans with roles against rivals at their best, simulated: the first tables of docs/evaluation.md.

    .venv/bin/python benchmarks/roles.py --traces ../shared/data/traces --csv benchmarks/results/roles.csv

Every contender is a policy at a token budget. `roles` has the plan that is best for `BalancedLatency`, its default, and
`roles latency` the one that is best for mean normalised latency; both give every stage its own budget and keep their
plan (`roles-static`). `cascade` and
load balancers run at the profile's budget, at 512 tokens and some at 2,048, and `pd_fixed` with the number of prefill
instances that is predicted to be best, with one more and with one less. All see the same requests at the same times, in
the steady state (`warm_up_s` of `plan_accuracy.py`). Runs are done seed by seed, each is one row of the CSV, and what
is there already is not run again; with everything there, only the tables are printed. A ratio is the geometric mean
over seeds of the ratios of runs with the same seed.

What is concluded from prompts that ride along with decodes for free depends on the knee of the dense layers, so
`--knees` also runs with other knees: `none` (every token costs compute) and `full` (compute hides behind the whole of
an empty step, as if nothing stood in its way). Two more variants keep the profile's knee: `overlap` (decodes' reads of
KV hide behind the prompts' compute or hide it, whichever takes longer, as if they ran at once) and `separate` (decodes
are cut beside a prompt as they are alone, as if the attention backend had separate calls).
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cascadeinfer.core.cost.latency import SEPARATE_CALLS_TOKENS
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import StageKind
from cascadeinfer.core.plan.objective import BalancedLatency, MeanNormalizedLatency, Objective
from cascadeinfer.core.plan.role_plan import RolePlan
from cascadeinfer.core.types import LengthRange
from cascadeinfer.evaluation.runs import RunSpec, plan_for, roles_for, run_once
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.figures.drawing import curve_style, grid_figure, logarithmic, save
from cascadeinfer.results.summary import Slo
from plan_accuracy import Part, cost_of, warm_up_s

FIGURES = ("normalised_latency_s_mean", "ttft_s_mean", "ttft_s_p99", "e2e_s_mean", "e2e_s_p99")
SMALL = 512
MEDIUM = 2048
RIVALS = ("bucket", "llumnix", "least_loaded")
KEYS = ("profile", "trace", "load", "knee", "contender", "seed")
KNEES = ("profile", "none", "full", "overlap", "separate")
COUNTED = 6000
"""Requests of a run that count, at least."""


class Contender(NamedTuple):
    """A run of a point, the objective of its plan, and its name in tables."""

    name: str
    spec: RunSpec
    objective: Objective = MeanNormalizedLatency()


def contenders(setting: Setting, base: RunSpec, shares: Sequence[float] = ()) -> list[Contender]:
    """All contenders of a point, with plans of these shares, too; the first ones say most."""
    found = [
        Contender("roles", with_(base, policy="roles-static"), BalancedLatency()),
        Contender("roles latency", with_(base, policy="roles-static")),
        *(
            Contender(f"roles {share:g}", with_(base, policy="roles-static"), BalancedLatency(share))
            for share in shares
        ),
        *splits(setting, with_(base, policy="pd_fixed")),
    ]
    policies = ("cascade", *RIVALS)
    found += [
        Contender(f"{policy} @{SMALL}", with_(base, policy=policy, max_batched_tokens=SMALL)) for policy in policies
    ]
    found += [Contender(policy, with_(base, policy=policy)) for policy in ("cascade", "llumnix")]
    if setting.profile.capacity.max_batched_tokens != MEDIUM:
        found += [
            Contender(f"{policy} @{MEDIUM}", with_(base, policy=policy, max_batched_tokens=MEDIUM))
            for policy in ("llumnix", "bucket")
        ]
    return found


def splits(setting: Setting, spec: RunSpec) -> list[Contender]:
    """`pd_fixed` at the ratio that is predicted to be best, and at its neighbours that carry the rate."""
    strict = with_(spec, allow_overload=False)
    try:
        best = roles_for(setting, strict)
    except PlanError:
        print(f"{setting.profile.name}: no ratio of pd_fixed carries the rate")
        return []
    assert best is not None  # it splits
    found = [Contender("pd_fixed", spec)]
    for change in (-1, 1):
        n_prefill = best.n_prefill + change
        try:
            roles_for(setting, with_(strict, n_prefill=n_prefill))
        except PlanError:
            continue
        found.append(Contender(f"pd_fixed {change:+d}", with_(spec, n_prefill=n_prefill)))
    return found


def with_(spec: RunSpec, **changes: object) -> RunSpec:
    """The run with these changes."""
    return replace(spec, **changes)  # type: ignore[arg-type]  # names of fields


def predicted_s(setting: Setting, spec: RunSpec, objective: Objective) -> float:
    """An objective's predicted value for what the run starts with; NaN for a policy without a plan."""
    there = setting.with_token_budget(spec.max_batched_tokens)
    plan = roles_for(there, spec) or plan_for(there, spec)
    if plan is None:
        return float("nan")
    if isinstance(plan, RolePlan):
        parts = [(part_of(stage.range, stage.n_instances, stage.kind), stage.budget_tokens) for stage in plan.every]
    else:
        budget = there.profile.capacity.max_batched_tokens
        parts = [(part_of(stage.range, stage.n_instances, StageKind.MIXED), budget) for stage in plan.stages]
    return cost_of(replace(plan.problem, objective=objective), parts)


def part_of(lengths: LengthRange, n_instances: int, kind: StageKind) -> Part:
    """A stage as `plan_accuracy.py` writes it."""
    return Part(kind is StageKind.PREFILL, lengths.lo_tokens, lengths.hi_tokens, n_instances)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--traces", type=Path, required=True, help="folder with <name>.csv.gz")
    parser.add_argument(
        "--names", default="azure_2023_conv,sharegpt_8k_llama2,servegen_deepseek_r1_1h,mooncake_synthetic"
    )
    parser.add_argument("--profiles", default="h100-llama-3.1-8b,a100-llama-3.1-8b,h100-llama-3.1-70b-tp4")
    parser.add_argument("--loads", default="0.85")
    parser.add_argument("--knees", default="profile", help=f"some of {', '.join(KNEES)}")
    parser.add_argument("--contenders", default="", help="some of them only")
    parser.add_argument("--shares", default="", help="also `roles` with these shares of the normalised latency")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables of what is there")
    parser.add_argument("--mine", default="roles", help="the contender that tables compare with the others")
    parser.add_argument("--figure", type=Path, default=None, help="PNG of the first table")
    options = parser.parse_args()
    rows = read(options.csv)
    points: list[tuple[str, ...]] = [
        (profile, trace, load, knee)
        for knee in options.knees.split(",")
        for profile in options.profiles.split(",")
        for trace in options.names.split(",")
        for load in options.loads.split(",")
    ]
    if not options.tables:
        for seed in range(options.seeds):
            run_missing(options, points, seed, rows)
    first_table(rows, options.mine)
    tables(rows, options.mine)
    if options.figure is not None:
        draw(rows, options.mine, options.figure)


def run_missing(options: argparse.Namespace, points: list[tuple[str, ...]], seed: int, rows: "Rows") -> None:
    """Run what the CSV lacks of this seed: the first contender at every point, then the second, and so on."""
    todo = []
    shares = [float(share) for share in options.shares.split(",") if share]
    for profile, trace, load, knee in points:
        file = options.traces / f"{trace}.csv.gz"
        setting = load_setting(profile, file, options.instances, 32_768, accept_poor_profile=True)
        setting = with_knee(setting, knee)
        rate = float(load) * setting.one_stage_capacity_rps
        warm_s = warm_up_s(setting, rate)
        requests = int(2.0 * warm_s * rate + max(COUNTED, warm_s * rate))
        share = warm_s * rate / requests
        base = RunSpec("roles-static", rate, seed, requests, Slo(1.0, 0.05), share, share, allow_overload=True)
        for number, (name, spec, objective) in enumerate(contenders(setting, base, shares)):
            if not options.contenders or name in options.contenders.split(","):
                key = (profile, trace, load, knee, name, str(seed))
                todo.append((number, key, replace(setting, objective=objective), spec))
    for _, key, setting, spec in sorted(todo, key=lambda item: item[0]):
        if key not in rows:
            rows[key] = run(setting, spec)
            append(options.csv, key, rows[key])


def with_knee(setting: Setting, knee: str) -> Setting:
    """The same with another step model; see above."""
    model = setting.profile.step_model
    changes: dict[str, float] = {
        "profile": {},
        "none": {"dense_knee_tokens": 0.0},
        "full": {"dense_knee_tokens": max(model.dense_knee_tokens, model.base_s / model.per_dense_token_s)},
        "overlap": {"mixed_hidden": 1.0},
        "separate": {"mixed_split_tokens": SEPARATE_CALLS_TOKENS},
    }[knee]
    return replace(setting, profile=replace(setting.profile, step_model=replace(model, **changes)))


def run(setting: Setting, spec: RunSpec) -> dict[str, float]:
    """The figures of one run, with the predictions for it."""
    started_s = time.process_time()
    outcome = run_once(setting, spec)
    figures = {name: float(getattr(outcome.summary, name)) for name in FIGURES}
    return figures | {
        "predicted_s": predicted_s(setting, spec, MeanNormalizedLatency()),
        "predicted_e2e_s": setting.histogram.mean_output_tokens * predicted_s(setting, spec, BalancedLatency(0.0)),
        "moves_per_request": len(outcome.migrations) / spec.requests,
        "cpu_s": time.process_time() - started_s,
    }


Rows = dict[tuple[str, ...], dict[str, float]]


def read(path: Path) -> Rows:
    """The rows of earlier runs."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            tuple(row[key] for key in KEYS): {name: float(v) for name, v in row.items() if name not in KEYS}
            for row in csv.DictReader(file)
        }


def append(path: Path, key: tuple[str, ...], figures: dict[str, float]) -> None:
    """Add a row, and the header to a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([*KEYS, *figures])
        writer.writerow([*key, *(f"{value:.6g}" for value in figures.values())])


def mean_over_seeds(rows: Rows, point: tuple[str, ...], name: str, figure: str) -> float:
    """Mean of a figure of one contender; NaN where it was not run."""
    values = [row[figure] for key, row in rows.items() if key[:5] == (*point, name)]
    return float(np.mean(values)) if values else float("nan")


def best_rival(rows: Rows, point: tuple[str, ...], figure: str) -> str:
    """The rival, at its best token budget, with the lowest mean of a figure; the cascade is ours."""
    names = dict.fromkeys(key[4] for key in rows if key[:4] == point)
    rivals = [name for name in names if not name.startswith(("roles", "cascade"))]
    return min(rivals, key=lambda name: mean_over_seeds(rows, point, name, figure))


def gains(rows: Rows, mine: str) -> dict[tuple[str, ...], dict[str, tuple[float, str]]]:
    """For each point and figure, a contender over the best rival for that figure, and the rival's name."""
    found: dict[tuple[str, ...], dict[str, tuple[float, str]]] = {}
    for point in dict.fromkeys(key[:4] for key in rows):
        found[point] = {}
        for figure in FIGURES:
            rival = best_rival(rows, point, figure)
            ours, theirs = (mean_over_seeds(rows, point, name, figure) for name in (mine, rival))
            found[point][figure] = ours / theirs, rival
    return found


def first_table(rows: Rows, mine: str) -> None:
    """A contender over the best rival of each figure, and the geometric means at each knee."""
    print(f"{mine} over the best rival of each figure")
    print("| profile | trace | knee | normalised | TTFT | TTFT p99 | e2e | e2e p99 |\n|" + "---|" * 8)
    found = gains(rows, mine)
    for (profile, trace, _, knee), cells in found.items():
        shown = [f"{ratio:.2f} ({rival})" for ratio, rival in cells.values()]
        print(f"| {profile} | {trace} | {knee} | {' | '.join(shown)} |")
    for knee in dict.fromkeys(point[3] for point in found):
        ratios = [[cells[figure][0] for figure in FIGURES] for point, cells in found.items() if point[3] == knee]
        means = np.exp(np.mean(np.log(ratios), axis=0))
        print(f"| geometric mean | | {knee} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    print()


def draw(rows: Rows, mine: str, file: Path) -> None:
    """The first table as a figure: one row per point, one mark per figure, on a logarithmic axis around 1."""
    found = {point: cells for point, cells in gains(rows, mine).items() if point[3] == KNEES[0]}
    chosen = {
        "normalised_latency_s_mean": "mean normalised latency",
        "e2e_s_mean": "mean end-to-end latency",
        "e2e_s_p99": "end-to-end latency, p99",
        "ttft_s_p99": "time to first token, p99",
    }
    title = f"{mine} over the best rival at its best token budget, 85 % load (simulated; below 1 is better)"
    sheet, (panel,) = grid_figure(1, 1, title, width=8.5, height=0.42 * len(found) + 1.0)
    panel.axvline(1.0, color="#555555", linewidth=1.0)
    for number, (figure, label) in enumerate(chosen.items()):
        style = curve_style(number, len(chosen)) | {"linestyle": "none", "markersize": 7.0}
        ratios = [cells[figure][0] for cells in found.values()]
        panel.plot(ratios, [row + 0.12 * (number - 1.5) for row in range(len(found))], label=label, **style)
    panel.set_yticks(range(len(found)), [f"{profile}, {trace}" for profile, trace, *_ in found])
    panel.invert_yaxis()
    logarithmic(panel, "x")
    panel.set_xlabel("ratio", fontsize=8)
    panel.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.1))
    save(sheet, file)


def tables(rows: Rows, mine: str) -> None:
    """Ratios of a contender to every other one, and predictions beside what was simulated."""
    points = list(dict.fromkeys(key[:4] for key in rows))
    print("| profile | load | knee | rival | normalised | TTFT | TTFT p99 | e2e | e2e p99 |\n|" + "---|" * 9)
    for profile, trace, load, knee in points:
        names = list(dict.fromkeys(key[4] for key in rows if key[:4] == (profile, trace, load, knee)))
        for name in names:
            if name != mine:
                cells = [ratio(rows, (profile, trace, load, knee), mine, name, figure) for figure in FIGURES]
                print(f"| {profile} {trace} | {load} | {knee} | {name} | {' | '.join(cells)} |")
    print("\n| profile | load | knee | contender | ms per token | end-to-end s | moves |\n|" + "---|" * 7)
    for profile, trace, load, knee in points:
        for name in list(dict.fromkeys(key[4] for key in rows if key[:4] == (profile, trace, load, knee))):
            runs = [row for key, row in rows.items() if key[:5] == (profile, trace, load, knee, name)]
            if np.isfinite(runs[0]["predicted_s"]):
                tokens = both(runs, "predicted_s", "normalised_latency_s_mean", 1e3)
                whole = both(runs, "predicted_e2e_s", "e2e_s_mean", 1.0)
                moves = float(np.mean([row["moves_per_request"] for row in runs]))
                print(f"| {profile} {trace} | {load} | {knee} | {name} | {tokens} | {whole} | {moves:.2f} |")


def both(runs: list[dict[str, float]], predicted: str, simulated: str, factor: float) -> str:
    """Predicted / simulated, and the error."""
    ours, theirs = (factor * float(np.mean([row[name] for row in runs])) for name in (predicted, simulated))
    return f"{ours:.1f} / {theirs:.1f} ({ours / theirs - 1.0:+.0%})"


def ratio(rows: Rows, point: tuple[str, ...], mine: str, name: str, figure: str) -> str:
    """A contender over another one, with the lowest and highest seed."""
    seeds = [key[5] for key in rows if key[:5] == (*point, name) and (*point, mine, key[5]) in rows]
    each = [rows[(*point, mine, s)][figure] / rows[(*point, name, s)][figure] for s in seeds]
    mean = f"{float(np.exp(np.mean(np.log(each)))):.2f}" if each else "-"
    return f"{mean} ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else mean


if __name__ == "__main__":
    main()
