"""Pages and pictures that programs in docs/ write are current."""

import runpy
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

pytestmark = pytest.mark.timeout(900)  # the planner is compiled first

DOCS = Path(__file__).parents[2] / "docs"


def test_the_events_page_is_what_its_generator_writes() -> None:
    """`python docs/generate_events.py` rewrites docs/events.md."""
    render = runpy.run_path(str(DOCS / "generate_events.py"))["render"]
    assert (DOCS / "events.md").read_text(encoding="utf-8") == render(), "run: .venv/bin/python docs/generate_events.py"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """What the program of the stepped picture draws now."""
    pictures: dict[str, str] = runpy.run_path(str(DOCS / "draw_idea.py"))["pictures"]()
    return pictures


def test_the_pictures_are_what_their_program_draws(drawn: dict[str, str]) -> None:
    """`python docs/draw_idea.py` rewrites docs/figures/idea-*.svg; the page shows all of them."""
    page = (DOCS / "idea.md").read_text(encoding="utf-8")
    assert len(drawn) == 4
    for name, text in drawn.items():
        assert (DOCS / "figures" / name).read_text(encoding="utf-8") == text, "run: .venv/bin/python docs/draw_idea.py"
        assert f"(figures/{name})" in page


def test_the_pictures_are_whole_and_stand_alone(drawn: dict[str, str]) -> None:
    """They are well-formed, have a title, and load nothing."""
    for text in drawn.values():
        root = ET.fromstring(text)  # noqa: S314 - drawn above
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert "href" not in text
