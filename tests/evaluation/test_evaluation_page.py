"""The evaluation's page: its tables hold what is in its results file, and nothing else."""

import importlib
import math
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (
    "# Words\n\n<!-- tables -->\nwhat was there before\n<!-- end of tables -->\n\n"
    "<!-- tuned --><!-- end of tuned -->\nmore words\n"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of `benchmarks/evaluation` as its scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "evaluation"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def figures_of(cells: ModuleType, norm_ms: float, **changes: float) -> Any:
    """A cell's figures; all that are not named are 1."""
    values: dict[str, Any] = {field.name: 1 for field in fields(cells.Figures)} | {"code": "abc", "norm_ms": norm_ms}
    return cells.Figures(**(values | changes))


def test_results_survive_the_file(script: Any, tmp_path: Path) -> None:
    """Appended cells are read back, and a rewritten file has the wanted cells in the wanted order."""
    cells = script("cells")
    file = tmp_path / "cells.csv"
    first = cells.Cell("p", "t", 0.85, "cascade", 0)
    second = cells.Cell("p", "t", 0.85, "round_robin", 1, 4)
    cells.append(file, first, figures_of(cells, 12.5))
    cells.append(file, second, figures_of(cells, 25.0))
    found = cells.read(file)
    assert [*found] == [first, second]
    assert found[second].norm_ms == 25.0
    assert isinstance(found[first].moves, int)
    cells.write(file, found, [second, cells.Cell("p", "t", 0.3, "cascade", 0)])
    assert [*cells.read(file)] == [second]


def test_ratios_are_of_the_same_seed(script: Any) -> None:
    """Ratios are taken seed by seed and averaged geometrically; a missing cell leaves no ratio."""
    cells, compare = script("cells"), script("compare")
    point = compare.Point("p", "t", 0.85)
    results = {
        point.cell("cascade", 0): figures_of(cells, 8.0),
        point.cell("cascade", 1): figures_of(cells, 20.0),
        point.cell("llumnix", 0): figures_of(cells, 10.0),
        point.cell("llumnix", 1): figures_of(cells, 16.0),
        point.cell("round_robin", 0): figures_of(cells, 9.0),
    }

    def norm(figures: Any) -> float:
        return float(figures.norm_ms)

    values = compare.ratios(results, point, "cascade", "llumnix", norm)
    assert values == pytest.approx([0.8, 1.25])
    assert compare.geometric(values) == pytest.approx(1.0)
    assert compare.ratios(results, point, "cascade", "round_robin", norm) == []
    assert compare.best_of(results, point, ["llumnix", "round_robin"], norm) == "llumnix"
    assert math.isnan(compare.mean(results, point, "round_robin", norm))
    assert compare.pooled_error([[1.0, 1.0], [1.1, 1.1]]) == pytest.approx(0.0)


def test_the_rate_within_a_limit_lies_between_the_loads_that_were_run(script: Any) -> None:
    """The rate is half-way between a load that keeps the limit and one that misses it by as much."""
    cells, compare, grid = script("cells"), script("compare"), script("grid")
    loads = (*grid.LOADS, grid.OVERLOAD)
    shares = dict(zip(loads, (1.0, 0.95, 0.85, 0.5, 0.1), strict=True))
    results = {
        compare.Point("p", "t", load).cell("cascade", seed): figures_of(
            cells, 1.0, rate_per_s=100 * load, within_5x=shares[load]
        )
        for load in loads
        for seed in grid.SEEDS
    }
    rate = compare.rate_within(results, compare.Point("p", "t", 0.85), "cascade", lambda f: f.within_5x, 0.9)
    assert rate == pytest.approx(100 * (grid.LOADS[1] + grid.LOADS[2]) / 2)
    low = compare.rate_within(results, compare.Point("p", "t", 0.85), "cascade", lambda f: f.within_5x, 0.05)
    assert math.isnan(low)


def test_rivals_are_taken_at_their_best_budget(script: Any) -> None:
    """
    The best rival is the one with the lowest mean at any budget, for each figure by itself; one that lacks a seed does
    not compete; ratios are per seed, with their interval.
    """
    cells, compare, grid, tuned = script("cells"), script("compare"), script("grid"), script("tuned")
    point = compare.Point(grid.TUNED_PROFILES[0], grid.TUNED_TRACES[0], grid.TUNED_LOAD)
    norms = {
        ("cascade", 8192): 9.0, ("cascade", 512): 8.0, ("cascade-no-share", 8192): 10.0, ("llumnix", 8192): 20.0,
        ("llumnix", 2048): 10.0, ("bucket", 1024): 11.0,
    }  # fmt: skip
    results = {
        point.cell(policy, seed, budget): figures_of(
            cells,
            norm * (1.0 + 0.1 * seed),
            ttft_p99_ms=40.0 if policy == "bucket" else 50.0,
            requests=1000,
            shared=120,
        )
        for (policy, budget), norm in norms.items()
        for seed in grid.TUNED_SEEDS
    }
    results[point.cell("vllm_dp", 0, 512)] = figures_of(cells, 1.0, ttft_p99_ms=1.0)
    lines = tuned.tuned_section(results).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if grid.TUNED_TRACES[0] in line]
    assert rows[0][2:] == [
        "normalised", "llumnix @2048", "0.90 (0.90 to 0.90)", "0.80 (0.80 to 0.80)", "0.90 (0.90 to 0.90)", "12.0%",
    ]  # fmt: skip
    assert rows[2][2:5] == ["TTFT p99", "bucket @1024", "1.25 (1.25 to 1.25)"]
    assert "| geometric mean |  | normalised |  | 0.90 | 0.80 | 0.90 |  |" in lines


def test_tuned_cells_are_everybody_at_each_budget(script: Any) -> None:
    """Each policy is run at each budget with each seed, the first seed first, and cells have different names."""
    grid, run = script("grid"), script("run")
    found = grid.tuned_cells()
    assert {cell.max_batched_tokens for cell in found} == set(grid.BUDGETS)
    assert len({run.name_of(cell) for cell in [*found, *grid.cells()]}) == len(found) + len(grid.cells())
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


def test_the_page_holds_the_results_and_keeps_its_words(script: Any, tmp_path: Path) -> None:
    """
    Tables replace what was between the markers: the ratio at the point that was run and `-` elsewhere. Points above 1
    are named.
    """
    cells, compare, grid, page_of = script("cells"), script("compare"), script("grid"), script("page")
    page = tmp_path / "evaluation.md"
    page.write_text(PAGE)
    point = compare.Point(grid.PAPER_GPUS[0], grid.TRACES[0], grid.LOADS[2])
    results = {
        point.cell(policy, seed): figures_of(cells, norm)
        for policy, norm in (("cascade", 12.0), ("llumnix", 10.0), ("round_robin", 40.0))
        for seed in grid.SEEDS
    }
    page_of.write_report(results, page)
    text = page.read_text()
    assert text.startswith("# Words")
    assert text.endswith("more words\n")
    assert "what was there before" not in text
    assert "1.200 (llumnix)" in text
    assert f"{point.profile} {point.trace} at 85%: 1.200" in text
    assert (tmp_path / "figures").is_dir()
    page.write_text("no markers")
    with pytest.raises(ValueError, match="tables"):
        page_of.write_report(results, page)
