"""`cascadeinfer plan --slo`: the fewest instances that keep an SLO, and what cannot be kept."""

import json
from pathlib import Path

import pytest
from experiment_words import run

QUICK = {"policy": "round_robin", "seeds": "2", "duration_s": "10"}


def words(trace: Path, **changes: str) -> list[str]:
    """A quick search."""
    given = {"profile": "h100-llama-3.1-8b", "trace": str(trace), "rate": "40", "slo": "p90", **QUICK, **changes}
    return ["plan", *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value))]


def test_the_fewest_keep_it_and_one_less_does_not(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The answer was simulated and is within both limits, one instance less was simulated and is not; the plan that
    follows is for that number; prediction and simulation are told apart.
    """
    out = tmp_path / "plan.json"
    assert run(*words(trace, ttft_slo="0.6", tpot_slo="0.03", json=str(out))) == 0
    content = json.loads(out.read_text())
    slo = content["slo"]
    n = slo["fewest_instances"]
    assert n > 1
    simulated = {tried["instances"]: tried for tried in slo["simulated"]}
    assert simulated[n]["keeps"]
    assert simulated[n]["ttft_s"]["mean"] <= 0.6
    assert simulated[n]["tpot_s"]["mean"] <= 0.03
    assert not simulated[n - 1]["keeps"]
    assert content["instances"] == n == sum(stage["instances"] for stage in content["stages"])
    assert slo["rate_per_instance_rps"] == pytest.approx(40.0 / n)
    assert slo["predicted_instances_for_the_rate"] >= 1
    text = capsys.readouterr().out
    assert f"simulated: {n} keep the SLO at 40 requests/s" in text
    assert f"{n - 1} miss it" in text
    assert f"predicted: {slo['predicted_instances_for_the_rate']} carry the rate" in text
    assert f"--instances {n} --profile" in text
    assert max(map(len, text.splitlines()[:8])) <= 100


def test_a_stricter_slo_needs_more(trace: Path, tmp_path: Path) -> None:
    """A limit on the step time that leaves hardly any room for batches takes more instances."""
    found = []
    for name, limit in (("wide", "0.03"), ("strict", "0.0105")):
        out = tmp_path / name
        assert run(*words(trace, ttft_slo="0.6", tpot_slo=limit, json=str(out))) == 0
        found.append(json.loads(out.read_text())["slo"]["fewest_instances"])
    assert found[0] < found[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ttft_slo": "0.001"}, "no number of instances keeps p90 of TTFT within 0.001 s: alone on an idle instance"),
        ({"tpot_slo": "0.001"}, "no number of instances keeps p90 of TPOT within 0.001 s: alone on an idle instance"),
        (
            {"rate": "20", "tpot_slo": "0.0095", "most_instances": "2"},
            "not even 2 instances keep the SLO: simulated p90 of TTFT",
        ),
        ({"rate": "4000", "most_instances": "3"}, "not even 3 instances carry 4000 requests/s, by prediction"),
        ({"slo": "99"}, "--slo: '99' is no percentile"),
        ({"slo": "p0"}, "--slo: 'p0' is no percentile"),
        ({"slo": "p100"}, "--slo: 'p100' is no percentile"),
        ({"slo": "pnan"}, "--slo: 'pnan' is no percentile"),
        ({"instances": "8"}, "--slo: the number of instances is either given or searched for"),
        ({"policy": "magic"}, "--policy: no policy 'magic'"),
        ({"policy": "cascade,llumnix"}, "--policy: no policy 'cascade,llumnix'"),
        ({"seeds": "0"}, "--seeds"),
        ({"most_instances": "0"}, "--most-instances"),
        ({"duration_s": "0"}, "--duration-s"),
        ({"warm_up": "1"}, "--warm-up"),
        ({"jobs": "0"}, "--jobs"),
    ],
)
def test_what_cannot_be_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], says: str
) -> None:
    """Exit code 2 and one line that says what is at fault."""
    assert run(*words(trace, **changes)) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""


def test_a_plan_needs_a_number_or_an_slo(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without either, both options are named."""
    assert run("plan", "--profile", "h100-llama-3.1-8b", "--trace", str(trace), "--rate", "5") == 2
    error = capsys.readouterr().err
    assert "--instances" in error
    assert "--slo p99" in error
