"""`cascadeinfer plan` and `cascadeinfer simulate`: results, files and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from cascadeinfer.cli.main import main

MIXED_ROWS = 400


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Nine short requests to each long one."""
    rng = np.random.default_rng(0)
    path = tmp_path / "mixed.csv"
    rows = ["arrival_s,prompt_tokens,output_tokens"]
    for i in range(MIXED_ROWS):
        prompt = int(rng.integers(8_000, 16_000)) if i % 10 == 0 else int(rng.integers(50, 300))
        rows.append(f",{prompt},{int(rng.integers(100, 300))}")
    path.write_text("\n".join(rows) + "\n")
    return path


def run(*words: str) -> int:
    """Exit code of a command line."""
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def plan_words(trace_file: Path, **changes: str) -> list[str]:
    """A good `plan` command, with changes."""
    options = {"profile": "h100-llama-3.1-8b", "trace": str(trace_file), "rate": "40", "instances": "8"} | changes
    return ["plan", *(word for name, value in options.items() for word in (f"--{name}", value))]


def test_plan_says_stages_and_writes_them(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixed workload gets more than one stage, all instances are placed, and the file says the same as the text."""
    out = tmp_path / "plan.json"
    assert run(*plan_words(trace), "--json", str(out)) == 0
    content = json.loads(out.read_text())
    assert len(content["stages"]) > 1
    assert sum(stage["instances"] for stage in content["stages"]) == 8
    assert content["predicted"] < content["predicted_one_stage"]
    text = capsys.readouterr().out
    assert f"{len(content['stages'])} stages" in text
    assert "--instances 8 --stages 0-" in text


def test_simulate_compares_policies_on_the_same_requests(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each policy has a row and a run per seed; the same command gives the same figures; stages make requests move."""
    words = [
        "simulate", *plan_words(trace)[1:], "--policy", "cascade,static_stages,least_loaded",
        "--seeds", "2", "--requests", "150",
    ]  # fmt: skip
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert run(*words, "--json", str(first)) == 0
    assert run(*words, "--json", str(second)) == 0
    runs = json.loads(first.read_text())["runs"]
    assert runs == json.loads(second.read_text())["runs"]
    assert {name: len(per_seed) for name, per_seed in runs.items()} == {
        "cascade": 2, "static_stages": 2, "least_loaded": 2,
    }  # fmt: skip
    assert all(r["requests"] == 150 and r["unfinished"] == 0 for per_seed in runs.values() for r in per_seed)
    moves = {name: sum(r["migrations"] for r in per_seed) for name, per_seed in runs.items()}
    assert moves["static_stages"] > 0
    assert moves["least_loaded"] == 0
    assert "static_stages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"profile": "h900-llama"}, "h100-llama-3.1-8b"),
        ({"rate": "-1"}, "--rate"),
        ({"rate": "nan"}, "--rate"),
        ({"rate": "100000"}, "capacity of 8 instances"),
        ({"instances": "0"}, "--instances"),
        ({"trace": "/nowhere.csv"}, "/nowhere.csv"),
    ],
)
def test_bad_input_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], says: str
) -> None:
    """Each mistake ends in exit code 2 and one line that names it; an unknown profile lists those that exist."""
    assert run(*plan_words(trace, **changes)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1


def test_malformed_trace_names_its_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad number in the trace is told with its line."""
    lines = trace.read_text().splitlines()
    lines[3] = ",many,5"
    trace.write_text("\n".join(lines) + "\n")
    assert run(*plan_words(trace)) == 2
    assert "line 4" in capsys.readouterr().err


def test_unknown_policy_lists_the_known(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--policy` names its choices."""
    assert run("simulate", *plan_words(trace)[1:], "--policy", "magic") == 2
    assert "least_loaded" in capsys.readouterr().err
