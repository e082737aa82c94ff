"""`--max-num-batched-tokens` of `simulate` and `sweep`: each policy at each token budget of a step."""

import json
from pathlib import Path

import pytest
from experiment_words import run, words_for

from cascadeinfer.core.types import InstanceCapacity

SMALL = {"seeds": "1", "requests": "200"}


def test_each_policy_runs_at_each_budget(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """
    Small chunks keep steps short at the price of the first token; the profile's own budget changes nothing; the best
    budget of each policy is told.
    """
    files = [tmp_path / name for name in ("plain.json", "tuned.json")]
    words = words_for("simulate", trace, **SMALL, policy="cascade,least_loaded")
    assert run(*words, "--json", str(files[0])) == 0
    capsys.readouterr()
    logs = ["--event-log", str(tmp_path / "log.jsonl")]
    assert run(*words, "--json", str(files[1]), *logs, "--max-num-batched-tokens", "512,8192", "--overload") == 0
    plain, tuned = (json.loads(file.read_text()) for file in files)
    assert plain["max_num_batched_tokens"] == [8192]
    assert tuned["max_num_batched_tokens"] == [512, 8192]
    assert [*tuned["runs"]] == ["cascade @512", "cascade @8192", "least_loaded @512", "least_loaded @8192"]
    for policy in ("cascade", "least_loaded"):
        assert tuned["runs"][f"{policy} @8192"] == plain["runs"][policy]
    [[small], [large]] = tuned["runs"]["least_loaded @512"], tuned["runs"]["least_loaded @8192"]
    assert small["tpot_s_p99"] < large["tpot_s_p99"]
    means = {label: runs[0]["normalised_latency_s_mean"] for label, runs in tuned["runs"].items()}
    best = min((512, 8192), key=lambda budget: means[f"least_loaded @{budget}"])
    assert f"least_loaded {best}" in capsys.readouterr().out.splitlines()[-1]
    assert {file.name for file in tmp_path.glob("log*")} == {
        f"log-{policy}-{budget}-0.jsonl" for policy in ("cascade", "least_loaded") for budget in (512, 8192)
    }


def test_sweeps_have_a_curve_for_each(trace: Path, tmp_path: Path) -> None:
    """Curves and highest rates are found for each policy at each budget."""
    out = tmp_path / "sweep.json"
    words = words_for("sweep", trace, **SMALL, policy="round_robin", rates="10,2000", bisections="1")
    assert run(*words, "--json", str(out), "--max-num-batched-tokens", "512,2048") == 0
    content = json.loads(out.read_text())
    assert [*content["curves"]] == [*content["highest_rate_per_s"]] == ["round_robin @512", "round_robin @2048"]
    assert content["curves"]["round_robin @512"] != content["curves"]["round_robin @2048"]


@pytest.mark.parametrize("command", ["simulate", "sweep"])
@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no token budget"), ("0", "'0'"), ("-5", "'-5'"), ("512,a", "'a'"), ("1.5", "'1.5'"), ("512,512", "twice")],
)
def test_bad_budgets_are_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, says: str
) -> None:
    """The option and the mistake are named before anything is simulated."""
    assert run(*words_for(command, trace, max_num_batched_tokens=text)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "--max-num-batched-tokens" in line
    assert says in line


def test_a_budget_too_small_for_the_load_is_told(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget at which the rate is above capacity is refused, unless overload is wanted."""
    words = words_for("simulate", trace, **SMALL, policy="round_robin", max_num_batched_tokens="8192,16")
    assert run(*words) == 2
    assert "above the capacity of 8 instances" in capsys.readouterr().err


def test_batch_slots_are_at_most_the_budget() -> None:
    """As in vLLM, an instance runs no more requests than a step has tokens."""
    capacity = InstanceCapacity(kv_blocks=10, block_size_tokens=16, max_num_seqs=1024, max_batched_tokens=8192)
    assert capacity.with_token_budget(512) == InstanceCapacity(10, 16, 512, 512)
    assert capacity.with_token_budget(2048) == InstanceCapacity(10, 16, 1024, 2048)
