"""`cascadeinfer sweep`: curves, the highest rate within an SLO, files and bad input."""

import json
from pathlib import Path

import pytest
from experiment_words import run, words_for

from cascadeinfer.cli.experiment_options import rates_of
from cascadeinfer.core.errors import ConfigError


def small(trace_file: Path, **changes: str) -> list[str]:
    """A quick sweep."""
    given = {"policy": "cascade,least_loaded", "seeds": "1", "requests": "150", "bisections": "2", "tpot_slo": "0.009"}
    return words_for("sweep", trace_file, **(given | changes))


def test_highest_rate_was_run_and_kept_the_slo(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate found keeps the share, no higher rate that was tried does, and both are in the file."""
    out = tmp_path / "sweep.json"
    assert run(*small(trace, rates="10,2000", json=str(out))) == 0
    content = json.loads(out.read_text())
    assert content["rates_per_s"] == [10.0, 2000.0]
    for found in content["highest_rate_per_s"].values():
        kept = {rate: share for rate, share in found["tried"]}  # noqa: C416 - pairs are lists in JSON
        assert len(kept) == 4
        assert kept[found["rate_rps"]] >= 0.9
        above = [share for rate, share in kept.items() if rate > found["rate_rps"]]
        assert above
        assert max(above) < 0.9
    assert "requests/s" in capsys.readouterr().out


def test_runs_last_a_minute_at_every_rate(trace: Path, tmp_path: Path) -> None:
    """With a duration, twice the rate has twice the requests; without duration and number, it is a minute."""
    out = tmp_path / "sweep.json"
    words = ["--policy", "round_robin", "--seeds", "1", "--bisections", "0", "--warm-up", "0", "--json", str(out)]
    assert run(*words_for("sweep", trace, rates="2,4"), *words) == 0
    content = json.loads(out.read_text())
    assert content["duration_s"] == 60.0
    assert [runs[0]["requests"] for runs in content["curves"]["round_robin"]] == [120, 240]


def test_curves_are_drawn(trace: Path, tmp_path: Path) -> None:
    """`--plot` writes a PNG."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sweep.png"
    assert run(*small(trace, bisections="0", plot=str(picture))) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_too_short_are_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The note names the rates at which runs were too short, and the policies if not all; long ones give no note."""
    words = ["--policy", "round_robin", "--seeds", "1", "--bisections", "0", "--warm-up", "0"]
    assert run(*words_for("sweep", trace, rates="2,2000", requests="60"), *words) == 0
    said = capsys.readouterr().err
    assert "note: at 2000/s requests took so long" in said
    assert run(*words_for("sweep", trace, rates="2", requests="200"), *words) == 0
    assert "requests took so long" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rates": "many"}, "--rates"),
        ({"rates": ""}, "--rates"),
        ({"rates": "1:2"}, "lo:hi:n"),
        ({"rates": "1:2:1"}, "--rates"),
        ({"rates": "2,1"}, "does not increase"),
        ({"rates": "0,1"}, "not a positive number"),
        ({"rates": "1,nan"}, "not a positive number"),
        ({"rates": "1:inf:3"}, "not a positive number"),
        ({"policy": "magic"}, "least_loaded"),
        ({"attain": "1"}, "--attain"),
        ({"bisections": "-1"}, "--bisections"),
        ({"profile": "h900-llama"}, "h100-llama-3.1-8b"),
        ({"instances": "0"}, "--instances"),
    ],
)
def test_bad_input_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], says: str
) -> None:
    """Each mistake ends in exit code 2 and one line, before anything is simulated."""
    assert run(*small(trace, **changes)) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""


def test_rates_between_two_ends() -> None:
    """Both ends are included and the distances are equal."""
    assert rates_of("5:20:4") == [5.0, 10.0, 15.0, 20.0]
    assert rates_of(" 1, 2.5,4 ") == [1.0, 2.5, 4.0]
    with pytest.raises(ConfigError):
        rates_of("5:20:4:2")


def test_highest_rates_are_per_instance_too(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The goodput of one instance is an eighth of that of eight, and the rate that failed bounds it from above."""
    out = tmp_path / "sweep.json"
    assert run(*small(trace, policy="least_loaded", rates="10,2000", json=str(out))) == 0
    [found] = json.loads(out.read_text())["highest_rate_per_s"].values()
    assert found["per_instance_rps"] == pytest.approx(found["rate_rps"] / 8)
    tried = dict(found["tried"])
    assert found["failed_rps"] == min(rate for rate, share in tried.items() if share < 0.9)
    assert found["failed_rps"] > found["rate_rps"]
    text = capsys.readouterr().out
    assert "per instance" in text
    assert f"(+{found['failed_rps'] / found['rate_rps'] - 1.0:.1%})" in text
    assert run(*small(trace, policy="least_loaded", rates="1900,2000", bisections="1")) == 0
    assert "none" in capsys.readouterr().out
