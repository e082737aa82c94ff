"""`cascadeinfer plan`: results, files and bad input."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from experiment_words import run, words_for

from cascadeinfer.config.policy import make_policy
from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.config.stages import read_stages
from cascadeinfer.core.cost.profile import FitError, Measurement, encode_profile
from cascadeinfer.core.errors import ProfileError

PNG = b"\x89PNG"
MEASUREMENT = Measurement(
    batches=40, left_out=90, rounds=1, steps=50, outliers=0, samples=30, measuring_s=18.0, step_share=0.98,
    max_decodes=64, max_kv_tokens=30_000, max_length_tokens=8_000, max_prefill_tokens=512,
)  # fmt: skip


def test_plan_says_stages_and_writes_them(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixed workload gets more than one stage, all instances are assigned, and the file agrees with the text."""
    out = tmp_path / "plan.json"
    assert run(*words_for("plan", trace), "--json", str(out)) == 0
    content = json.loads(out.read_text())
    stages = content["stages"]
    assert len(stages) > 1
    assert sum(stage["instances"] for stage in stages) == 8
    assert stages[0]["lo_tokens"] == 0
    assert stages[-1]["hi_tokens"] is None
    assert all(a["hi_tokens"] == b["lo_tokens"] for a, b in pairwise(stages))
    assert content["predicted"] < content["predicted_one_stage"]
    text = capsys.readouterr().out
    assert f"{len(stages)} stages" in text
    assert f"{1e3 * content['predicted_one_stage']:.2f} ms per output token" in text
    assert f"--instances 8 --stages 0-{stages[0]['hi_tokens']}:{stages[0]['instances']}," in text


def test_plan_file_says_where_it_comes_from(trace: Path, tmp_path: Path) -> None:
    """Profile, version and command are in the file."""
    out = tmp_path / "plan.json"
    assert run(*words_for("plan", trace), "--json", str(out)) == 0
    source = json.loads(out.read_text())["provenance"]
    assert source["simulated"] is True
    assert source["profile"] == "h100-llama-3.1-8b"
    assert {"version", "commit", "command", "seeds"} <= set(source)


def test_margin_keeps_one_stage(trace: Path, tmp_path: Path) -> None:
    """A margin above the gain results in one stage; the prediction for one stage is unchanged."""
    files = [tmp_path / name for name in ("default.json", "wide.json")]
    assert run(*words_for("plan", trace), "--json", str(files[0])) == 0
    assert run(*words_for("plan", trace, margin="0.99"), "--json", str(files[1])) == 0
    default, wide = (json.loads(file.read_text()) for file in files)
    assert len(wide["stages"]) == 1
    assert wide["predicted"] == wide["predicted_one_stage"] == default["predicted_one_stage"]


def test_failed_requests_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BurstGPT records failed requests without an answer; the plan says how many it did not count."""
    file = tmp_path / "burst.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    rows = [
        "5,ChatGPT,472,0,472,Conversation log",
        "45,ChatGPT,1087,230,1317,Conversation log",
        "118,GPT-4,0,0,0,API log",
    ]
    file.write_text("\n".join([head, *rows]) + "\n")
    assert run(*words_for("plan", file)) == 0
    assert "2 requests of the trace that had no answer are left out" in capsys.readouterr().err


def test_a_poor_profile_is_refused(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A profile whose own measurement is poor is used only when the operator says so."""
    shipped = load_profile("h100-llama-3.1-8b")
    worst = FitError(part="held out: all", samples=9, median=0.5, p90=0.9, bias=0.0, measured=True)
    poor = replace(shipped, fit_errors=(worst,), measurement=MEASUREMENT)
    file = tmp_path / "poor.json"
    file.write_bytes(encode_profile(poor))
    words = words_for("plan", trace, profile=str(file))
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert "not fit for use" in said
    assert "50%" in said
    assert len(said.splitlines()) == 1
    assert run(*words, "--accept-poor-profile") == 0
    with pytest.raises(ProfileError, match="not fit for use"):
        make_policy(ServeOptions(profile=str(file)))
    make_policy(ServeOptions(profile=str(file), accept_poor_profile=True))


def test_objectives_are_not_all_the_same(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each objective is reported in its own unit."""
    told = {}
    for name in ("latency", "balanced", "ttft-tpot", "slo"):
        assert run(*words_for("plan", trace, objective=name)) == 0
        told[name] = capsys.readouterr().out
    assert "ms per output token" in told["latency"]
    assert "25% by request, the rest by token" in " ".join(told["balanced"].split())
    assert "TTFT + 10 x TPOT" in " ".join(told["ttft-tpot"].split())
    assert "requests within TTFT 2 s" in " ".join(told["slo"].split())


def test_plan_is_drawn(trace: Path, tmp_path: Path) -> None:
    """`--plot` writes a PNG."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert run(*words_for("plan", trace, plot=str(picture))) == 0
    assert picture.read_bytes().startswith(PNG)


def test_derived_profile_is_told(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures based on a derived profile come with a note; those based on a measured one do not."""
    assert run(*words_for("plan", trace, profile="l40-llama-3.1-8b", rate="8")) == 0
    assert "is derived" in capsys.readouterr().err
    assert run(*words_for("plan", trace)) == 0
    assert "is derived" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"profile": "h900-llama"}, "h100-llama-3.1-8b"),
        ({"rate": "-1"}, "--rate"),
        ({"rate": "0"}, "--rate"),
        ({"rate": "nan"}, "--rate"),
        ({"rate": "inf"}, "--rate"),
        ({"rate": "100000"}, "capacity of 8 instances"),
        ({"instances": "0"}, "--instances"),
        ({"margin": "nan"}, "--margin"),
        ({"margin": "1.5"}, "--margin"),
        ({"objective": "joy"}, "latency, balanced, ttft-tpot or slo"),
        ({"ttft_slo": "0"}, "--ttft-slo"),
        ({"context": "1"}, "--context"),
        ({"trace": "/nowhere.csv"}, "/nowhere.csv"),
        ({"json": "/nowhere/plan.json"}, "/nowhere"),
        ({"plot": "/nowhere/plan.png"}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], says: str
) -> None:
    """Each mistake ends in exit code 2 and one line that names it, for an unknown profile with the known ones."""
    assert run(*words_for("plan", trace, **changes)) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""


def test_capacity_is_told(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate reported as capacity can be planned; twice that rate cannot."""
    assert run(*words_for("plan", trace, rate="100000")) == 2
    told = float(capsys.readouterr().err.split("about")[1].split()[0])
    assert run(*words_for("plan", trace, rate=str(0.95 * told))) == 0
    assert run(*words_for("plan", trace, rate=str(2 * told))) == 2


@pytest.mark.parametrize(
    ("row", "line"), [(",many,5", "line 4"), (",5", "line 4"), (",0,5", "line 4"), (",nan,5", "line 4")]
)
def test_malformed_trace_names_its_line(trace: Path, capsys: pytest.CaptureFixture[str], row: str, line: str) -> None:
    """A bad row in the trace is reported with its line number."""
    lines = trace.read_text().splitlines()
    lines[3] = row
    trace.write_text("\n".join(lines) + "\n")
    assert run(*words_for("plan", trace)) == 2
    assert line in capsys.readouterr().err


def test_empty_trace_is_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace with only a header is no workload."""
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n")
    assert run(*words_for("plan", trace)) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_hint_for_the_server_keeps_it_planning(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line to copy names the profile, from which the server plans; `--stages` would fix the stages for good."""
    assert run(*words_for("plan", trace)) == 0
    hint = capsys.readouterr().out.partition("for the server: ")[2].splitlines()[0]
    assert hint.startswith("--instances 8 --profile h100-llama-3.1-8b")
    assert "--stages" not in hint


def test_plan_with_roles_says_what_each_stage_computes(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every instance has a stage with a kind and a budget of those given, and the file agrees with the text."""
    out = tmp_path / "plan.json"
    words = [*words_for("plan", trace, max_num_batched_tokens="512,4096"), "--roles", "--json", str(out)]
    assert run(*words) == 0
    content = json.loads(out.read_text())
    stages = content["stages"]
    assert sum(stage["instances"] for stage in stages) == 8
    assert {stage["kind"] for stage in stages} <= {"prefill", "mixed", "decode"}
    assert {stage["max_num_batched_tokens"] for stage in stages} <= {512, 4096}
    text = capsys.readouterr().out
    assert f"{1e3 * content['predicted']:.2f} ms per output token (25% by request, the rest by token)" in text
    assert "At 0.8 x the rate" in text
    given = text.partition("--stages ")[2].split()[0]
    assert f"--instances 8 --max-num-batched-tokens {max(s['max_num_batched_tokens'] for s in stages)}" in text
    assert read_stages(given) == read_stages(str(out))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-num-batched-tokens", "512"], "--max-num-batched-tokens"),
        (["--roles", "--max-num-batched-tokens", "0"], "--max-num-batched-tokens"),
        (["--roles", "--plot", "plan.png"], "--roles"),
    ],
)
def test_plan_refuses_contradictions_about_roles(
    trace: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    """Budgets without roles, no budget, and a figure of roles are one line and exit code 2."""
    assert run(*words_for("plan", trace), *more) == 2
    assert said in capsys.readouterr().err
