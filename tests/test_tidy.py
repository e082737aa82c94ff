"""Style rules as a test: file and function length, banned names, purity of the core, headers, dead modules."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "cascadeinfer"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_STEMS = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
PURE = ("core", "sim", "workload")
# Modules loaded by name, not by import: the command line's entry, vLLM's connector path.
ENTRY_STEMS = {"__init__", "__main__", "main"}


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function in a file, including methods."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_is_tidy(path: Path) -> None:
    """A module has a header, a name that says its concern, and at most 400 lines; its functions at most 60."""
    text = path.read_text()
    assert path.stem not in BANNED_STEMS, f"{path.name}: name the concern"
    assert ast.get_docstring(ast.parse(text)), "no module header"
    assert len(text.splitlines()) <= MAX_MODULE_LINES, "split the module by concern"
    for function in functions_of(path):
        docstring = ast.get_docstring(function, clean=False)
        doc_lines = len(docstring.splitlines()) + 1 if docstring else 0
        length = (function.end_lineno or function.lineno) - function.lineno + 1 - doc_lines
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in PURE],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_pure_code_has_no_global_randomness(path: Path) -> None:
    """
    Pure packages draw only from generators passed in: no `random.x()`, and no `np.random.x()` but `default_rng` or
    types.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value)
        if owner in {"np.random", "numpy.random"}:
            assert node.func.attr in {"default_rng", "Generator", "SeedSequence", "PCG64"}, ast.unparse(node)
        if owner == "random":
            assert node.func.attr == "Random", ast.unparse(node)


def test_no_swallowed_errors() -> None:
    """No handler consists of `pass` alone, and none catches everything bare."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert node.type is not None, f"{where}: bare except"
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{where}: except-pass"


def taken_from_packages(text: str) -> Iterator[str]:
    """What `from a.b import c` imports, as `a.b.c`: a module if a.b is a package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_dead_modules() -> None:
    """Each module is named by another source file or is an entry point."""
    texts = {path: path.read_text() for path in SOURCES}
    taken = {path: set(taken_from_packages(text)) for path, text in texts.items()}
    for path in SOURCES:
        if path.stem in ENTRY_STEMS:
            continue
        dotted = ".".join(("cascadeinfer", *path.relative_to(PACKAGE).with_suffix("").parts))
        named = any(dotted in text or dotted in taken[other] for other, text in texts.items() if other != path)
        assert named, f"{dotted} is imported nowhere"


def test_test_files_have_names_of_their_own() -> None:
    """Pytest imports test files by their bare names, so two of one name end the collection."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []


def test_no_leftovers() -> None:
    """No FIXME or TODO is committed; open points go to an issue."""
    files = subprocess.run(
        ["git", "ls-files", "*.py", "Makefile"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in files.stdout.split():
        if name == "tests/test_tidy.py" or not (ROOT / name).exists():
            continue
        text = (ROOT / name).read_text()
        assert "FIXME" not in text, name
        assert "TODO" not in text, name
