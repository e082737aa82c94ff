"""The benchmarks of plans: what they simulate is what they predict, and changing workloads change as described."""

import argparse
import gzip
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cascadeinfer.core.layout import Proposal
from cascadeinfer.core.plan.planner import predict
from cascadeinfer.evaluation.runs import RunSpec, plan_for, roles_for
from cascadeinfer.results.summary import Slo
from cascadeinfer.workload.trace import Trace

ROOT = Path(__file__).resolve().parents[2]
PROFILE = "h100-llama-3.1-8b"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark as it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    """A folder with two traces: short requests, and long ones."""
    rng = np.random.default_rng(0)
    for name, prompt in (("short", 300), ("long", 6000)):
        prompts = np.minimum(rng.geometric(1.0 / prompt, 2000), 16_000)
        outputs = np.minimum(rng.geometric(1.0 / 100, 2000), 2000)
        rows = "".join(f"{n},{p},{o},\n" for n, (p, o) in enumerate(zip(prompts, outputs, strict=True)))
        with gzip.open(tmp_path / f"{name}.csv.gz", "wt") as file:
            file.write("row_id,prompt_tokens,output_tokens,arrival_s\n" + rows)
    return argparse.Namespace(traces=tmp_path, instances=4)


def setting_in(script: Any, options: argparse.Namespace, trace: str) -> Any:
    """The setting of a trace, as the benchmarks load it."""
    return script("drift").setting_of(PROFILE, options.traces / f"{trace}.csv.gz", options.instances)


def run_of(accuracy: ModuleType, kind: str, rate: float, parts: Any) -> Any:
    """A run of these parts, without anything simulated."""
    return accuracy.Run(PROFILE, "short", 0.7, kind, 2048, rate, parts, 0, 0, 1.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["one", "cascade", "split", "hybrid"])
def test_a_plan_written_down_is_predicted_like_the_plan(
    script: Any, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Parts hold all that the prediction needs, every instance has a place, and the plans of the kinds differ."""
    accuracy = script("plan_accuracy")
    setting = setting_in(script, options, "short").with_token_budget(2048)
    monkeypatch.setattr(accuracy, "setting_of", lambda *_: setting)
    rate = 0.7 * setting.one_stage_capacity_rps
    parts = accuracy.plan_of(setting, rate, kind)
    assert sum(part.n for part in parts) == 4
    assert any(part.prefill for part in parts) == (kind in ("split", "hybrid"))
    predicted_s = accuracy.predicted_s(run_of(accuracy, kind, rate, parts), options)
    layout = accuracy.layout_of(parts, 4)
    if kind in ("one", "cascade"):
        stages = layout.stages.stages
        proposal = Proposal(tuple(s.range.lo_tokens for s in stages[1:]), tuple(len(s.instance_ids) for s in stages))
        assert predicted_s == pytest.approx(predict(setting.problem(rate), proposal).cost)
    elif kind == "split":
        n_prefill = sum(part.n for part in parts if part.prefill)
        there = setting.plan_roles(rate, (2048,), split=True, n_prefill=n_prefill)
        assert predicted_s == pytest.approx(there.cost)


@pytest.mark.parametrize("name", ["roles", "roles latency", "pd_fixed", "cascade"])
def test_a_contender_is_predicted_by_its_own_plan(script: Any, options: argparse.Namespace, name: str) -> None:
    """The value of a plan's own objective is the plan's cost, with a budget for each stage."""
    roles = script("roles")
    setting = setting_in(script, options, "long")
    rate = 0.7 * setting.one_stage_capacity_rps
    base = RunSpec("roles", rate, 0, 100, Slo(1.0, 0.05), allow_overload=True)
    contenders = {contender.name: contender for contender in roles.contenders(setting, base)}
    assert {"pd_fixed", "llumnix @512"} < set(contenders)
    _, spec, objective = contenders[name]
    there = replace(setting, objective=objective)
    plan = roles_for(there, spec) or plan_for(there, spec)
    assert plan is not None
    assert roles.predicted_s(there, spec, objective) == pytest.approx(plan.cost)


def test_neighbours_of_the_best_ratio_run_too(script: Any, options: argparse.Namespace) -> None:
    """`pd_fixed` is tuned: one instance for prompts more and one less, where these carry the rate."""
    roles = script("roles")
    setting = setting_in(script, options, "long")
    spec = RunSpec("pd_fixed", 0.5 * setting.one_stage_capacity_rps, 0, 100, Slo(1.0, 0.05), allow_overload=True)
    best = roles_for(setting, spec)
    assert best is not None
    found = {contender.name: contender.spec.n_prefill for contender in roles.splits(setting, spec)}
    assert found.pop("pd_fixed") is None
    assert found
    assert all(n_prefill == best.n_prefill + int(name.split()[1]) for name, n_prefill in found.items())


def test_a_run_counts_when_the_cache_is_full(script: Any, options: argparse.Namespace) -> None:
    """Longer outputs need a longer warm-up, and no output takes longer than it."""
    accuracy = script("plan_accuracy")
    setting = setting_in(script, options, "short")
    rate = 0.5 * setting.one_stage_capacity_rps
    warm_s = accuracy.warm_up_s(setting, rate)
    step_s = setting.plan(rate).stages[0].service.step_s
    outputs = setting.trace.output_tokens
    assert np.mean(outputs) * step_s < warm_s <= np.max(outputs) * step_s


def shares_of_long(requests: Trace) -> list[float]:
    """The share of prompts above 2,000 tokens in each third of the minute that the run takes."""
    third = (requests.arrival_s // 20.0).astype(int)
    return [float((requests.prompt_tokens[third == n] > 2000).mean()) for n in range(3)]


def test_workloads_change_as_described(
    script: Any, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One turns into the other; a day has its night at both ends; long prompts come in the middle third only."""
    drift = script("drift")
    monkeypatch.setattr(drift, "DURATION_S", 60.0)
    for name, mix in drift.MIXES.items():
        monkeypatch.setitem(drift.MIXES, name, mix._replace(first="short", second="long"))
    made = {name: drift.workload_of(name, PROFILE, 0, options).requests for name in drift.MIXES}
    first, _, last = shares_of_long(made["reasoning"])
    assert first < 0.01
    assert last > 0.5
    quarters = np.histogram(made["day"].arrival_s, bins=4, range=(0.0, 60.0))[0]
    assert min(quarters[1:3]) > 1.5 * max(quarters[0], quarters[3])
    burst = made["long_burst"]
    long_s = burst.arrival_s[burst.prompt_tokens > 4000]
    assert long_s.min() > 20.0
    assert long_s.max() < 40.0
