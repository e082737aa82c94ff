"""The files that GitHub and archives read: each is valid by the schema of its format, offline."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from environments import ROOT

from cascadeinfer import __version__

GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
CHECKED = {
    "vendor.github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "vendor.github-issue-forms": FORMS,
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}
"""Schemas that check-jsonschema brings, with the files that follow them."""


@pytest.mark.parametrize("schema", CHECKED)
def test_files_follow_the_schema_of_their_format(schema: str) -> None:
    """`check-jsonschema` accepts every file."""
    files = CHECKED[schema]
    assert files
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files],
        check=False,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff names the package's version."""
    (version,) = re.findall(
        r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert version == __version__


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_programs_that_workflows_run_exist(path: Path) -> None:
    """Each script of the checkout that a workflow runs is there."""
    named = re.findall(r"(?:tools/[\w/]+\.py|\.ci/run)", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
