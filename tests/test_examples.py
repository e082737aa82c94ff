"""The examples run unchanged and print what they promise."""

import runpy
from pathlib import Path

import pytest

from cascadeinfer.config.policy import make_policy
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.evaluation.runs import RunSpec, run_once
from cascadeinfer.evaluation.setting import load_setting
from cascadeinfer.eventlog.reader import open_log
from cascadeinfer.eventlog.replay import replay
from cascadeinfer.results.summary import Slo

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = {
    "own_policy.py": ("RoundRobin", "TwoChoices", "simulated"),
    "plan_stages.py": ("5 requests/s", "30 requests/s", "predicted gain"),
    "replay_a_run.py": ("of them migrations", "events: the same"),
}


def test_every_example_is_known() -> None:
    """A new example needs its expected output here."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They run as programs."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    assert [words for words in SAID[name] if words not in output] == []


def test_one_line_makes_an_own_policy_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    With its `INFO` in `POLICIES`, it can be made for `serve`, simulated by name, logged and replayed, with no other
    change.
    """
    own = runpy.run_path(str(EXAMPLES / "own_policy.py"))
    monkeypatch.setitem(POLICIES, "two_choices", own["INFO"])
    assert isinstance(make_policy(ServeOptions(policy="two_choices")), own["TwoChoices"])
    setting = load_setting("h200-llama-3.1-8b", Path("sample"), 3)
    log = tmp_path / "log"
    run_once(setting, RunSpec("two_choices", 8.0, 0, 100, Slo(2.0, 0.1)), event_log=log)
    replayed = replay(open_log(log))
    assert replayed.difference is None
    assert replayed.effects >= 100
