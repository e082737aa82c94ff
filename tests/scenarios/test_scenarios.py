"""Each golden transcript matches the policy, and together they show every message and every way to lose one."""

from pathlib import Path

import pytest
from scenario_runner import SCENARIOS, play


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    """The policy's effects are those of the transcript; `scenario_runner.py --rewrite` updates them."""
    text = path.read_text()
    now = play(text)
    assert now == text
    assert "WRONG" not in now, "a command that makes no sense"


def test_transcripts_cover_the_protocol() -> None:
    """Every kind of message, every reason to decline, and every way a message can go wrong is shown."""
    everything = "".join(path.read_text() for path in SCENARIOS)
    wanted = ["ask ", "bid ", "award ", "accept ", "withdraw ", "advert:", "> drop ", " twice", "> lose ", "> drain "]
    wanted += [f": {reason}\n" for reason in ("busy", "no_slot", "no_blocks", "no_gain", "draining", "expired")]
    assert [word for word in wanted if word not in everything] == []
