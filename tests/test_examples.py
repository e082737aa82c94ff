"""The examples run as they are, and say what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = {
    "own_policy.py": ("RoundRobin", "TwoChoices", "simulated"),
    "plan_stages.py": ("5 requests/s", "30 requests/s", "predicted gain"),
    "replay_a_run.py": ("of them migrations", "events: the same"),
}


def test_every_example_is_known() -> None:
    """A new one comes with what it says."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As programs."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    assert [words for words in SAID[name] if words not in output] == []
