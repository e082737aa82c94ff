"""The documentation's site: it builds without a warning, loads nothing from elsewhere, and keeps the pages' links."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.timeout(900)  # the build, on a busy machine

ROOT = Path(__file__).parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
REPOSITORY = "https://example.org/repository"
LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(https?:[^\"'> ]+)")
STYLES = re.compile(r"<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon)[^>]*\bhref=[\"']?(https?:[^\"'> ]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link, a page outside the navigation or a name that does not exist ends the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    """Each Markdown file of docs/ has its page, and so have those beside it."""
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    places = [path.parent if path.stem in {"index", "README"} else path.with_suffix("") for path in sources]
    places += [Path(place).with_suffix("") for place in HOOKS["BESIDE"].values()]
    assert [str(place) for place in places if not (site / place / "index.html").is_file()] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """No script, style, font or image has an address outside the site."""
    pages = list(site.rglob("*.html"))
    found = {
        address
        for page in pages
        for pattern in (LOADED, STYLES)
        for address in pattern.findall(page.read_text(encoding="utf-8"))
    }
    assert len(pages) > 30
    assert found == set()


def test_the_reference_shows_the_docstrings(site: Path) -> None:
    """The page on Python has the modules' classes and functions with what they say."""
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("core.policy.Policy", "core.view.InstanceView", "sim.run.simulate", "eventlog.replay.replay"):
        assert f'id="cascadeinfer.{name}"' in page


def rewritten(markdown: str, source: str, place: str) -> str:
    """A page's text as the site gets it."""
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / source), src_uri=place))
    text: str = HOOKS["on_page_markdown"](markdown, page, SimpleNamespace(repo_url=REPOSITORY), None)
    return text


@pytest.mark.parametrize(
    ("source", "place", "link", "there"),
    [
        ("docs/tour.md", "tour.md", "migration.md#a", "migration.md#a"),
        ("docs/protocols/bidask.md", "protocols/bidask.md", "../tour.md", "../tour.md"),
        (
            "docs/tour.md",
            "tour.md",
            "../src/cascadeinfer/core/view.py",
            f"{REPOSITORY}/blob/main/src/cascadeinfer/core/view.py",
        ),
        ("docs/index.md", "index.md", "../CONTRIBUTING.md", "project/contributing.md"),
        ("CONTRIBUTING.md", "project/contributing.md", "docs/vllm.md#x", "../vllm.md#x"),
        (
            "examples/README.md",
            "project/examples.md",
            "own_policy.py",
            f"{REPOSITORY}/blob/main/examples/own_policy.py",
        ),
        ("docs/paper.md", "paper.md", "https://arxiv.org", "https://arxiv.org"),
        ("docs/tour.md", "tour.md", "#here", "#here"),
    ],
)
def test_links_lead_to_the_same_place(source: str, place: str, link: str, there: str) -> None:
    """Between pages they stay relative; to other files they become addresses in the repository."""
    assert rewritten(f"See [it]({link}).", source, place) == f"See [it]({there})."


def test_code_keeps_its_brackets() -> None:
    """What looks like a link in a code block is left alone."""
    text = "```\na[0](../src)\n```\n"
    assert rewritten(text, "docs/tour.md", "tour.md") == text


def test_a_link_that_leads_nowhere_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """And so an error of the strict build."""
    rewritten("[it](../src/no_such.py)", "docs/tour.md", "tour.md")
    assert "leads nowhere" in caplog.text


def test_anchors_are_those_of_github() -> None:
    """Marks vanish, spaces become hyphens, nothing is trimmed."""
    assert HOOKS["github_anchor"]("Where is ...?", "-") == "where-is-"
    assert HOOKS["github_anchor"]("The fields of `/admin/instances`", "-") == "the-fields-of-admininstances"
