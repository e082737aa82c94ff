"""A release gets its section of the changelog; a tag that is not the version, or is not described, is refused."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "release_notes.py"
TOOL = runpy.run_path(str(SCRIPT))
CHANGELOG = """# Changelog

## [Unreleased]

### Added

- Later.

## [0.2.0] - 2026-12-01

### Fixed

- A fault.

## [0.1.0] - 2026-11-01

- First.

[Unreleased]: https://example.org
"""


def source(version: str) -> str:
    """The package's first module."""
    return f'"""Doc."""\n__version__ = "{version}"\n'


@pytest.mark.parametrize(("version", "text"), [("0.2.0", "### Fixed\n\n- A fault."), ("0.1.0", "- First.")])
def test_a_version_has_its_section(version: str, text: str) -> None:
    """Heading, later and earlier sections and link targets are left out."""
    assert TOOL["notes"](f"v{version}", source(version), CHANGELOG) == text


@pytest.mark.parametrize(
    ("tag", "version", "said"),
    [
        ("v0.2.0", "0.1.0", "says 0.1.0"),
        ("0.1.0", "0.1.0", "tag v0.1.0"),
        ("v0.3.0", "0.3.0", "no section"),
        ("vUnreleased", "Unreleased", "no section"),
    ],
)
def test_an_unready_tag_is_refused(tag: str, version: str, said: str) -> None:
    """The message says what does not agree."""
    with pytest.raises(TOOL["NotReadyError"], match=said):
        TOOL["notes"](tag, source(version), CHANGELOG)


def test_an_empty_section_is_refused() -> None:
    """A heading alone describes nothing."""
    with pytest.raises(TOOL["NotReadyError"], match="empty"):
        TOOL["notes"]("v1.0.0", source("1.0.0"), "## [1.0.0] - 2027-01-01\n\n## [0.9.0] - 2026-12-01\n\n- x\n")


def test_the_program_refuses_in_one_line() -> None:
    """Exit code 2 and one line, without the package installed."""
    ended = subprocess.run(
        [sys.executable, "-S", SCRIPT, "v999.0.0"], check=False, capture_output=True, text=True, env={}
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
