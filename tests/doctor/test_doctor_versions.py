"""The versions that the doctor takes are those of the extras."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from cascadeinfer.doctor.checks.machine import OPEN_FILES_WANTED
from cascadeinfer.doctor.checks.software import NIXL_SUPPORTED, SUPPORTED

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def minors(package: str) -> set[str]:
    """Minor versions that some extra takes."""
    asked = [Requirement(text) for extra in ("cpu", "gpu") for text in EXTRAS[extra]]
    candidates = [f"{major}.{minor}" for major in (0, 1) for minor in range(50)]
    return {
        candidate
        for requirement in asked
        if requirement.name == package
        for candidate in candidates
        if f"{candidate}.0" in requirement.specifier
    }


def test_versions_are_those_of_the_extras() -> None:
    """For vLLM's two builds, and NIXL."""
    assert {name: set(supported) for name, supported in SUPPORTED.items()} == {name: minors(name) for name in SUPPORTED}
    assert set(NIXL_SUPPORTED) == minors("nixl")


def test_the_limit_of_open_files_is_the_servers() -> None:
    """What it asks for at its start; read as text, since its module needs an engine."""
    text = (ROOT / "src" / "cascadeinfer" / "frontend" / "listening.py").read_text()
    assert f"OPEN_FILES: Final = {OPEN_FILES_WANTED}\n" in text
