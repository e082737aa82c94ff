"""
Every command that a page shows is run, or is checked as far as it can be and listed here with the reason.

`RUN` and `CHECKED` map what a command begins with to the function that does it; `NOT_RUN` says why, and names the test
that does the same with other words, if there is one.
"""

import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cascadeinfer.cli.main import main
from support.shown_commands import PAGES, ROOT, Command, parsed_by_serve, shown_commands

pytestmark = pytest.mark.timeout(900)  # vLLM's parser takes a while to import on a busy machine

COMMANDS = shown_commands()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FASTER = {"--requests": "40", "--seeds": "1", "--instances": "2", "--rate": "2"}
"""Sizes with which a simulation that takes minutes is run here."""


class NotRun(NamedTuple):
    """Why a command is not run as it stands, and a test that does the same in its own way (`file::function`)."""

    reason: str
    instead: str | None = None


NOT_RUN = {
    r"vllm serve MODEL": NotRun("starts an engine on another machine", "engine/test_standing_live.py"),
    r"(cascadeinfer cluster|ray start) ": NotRun("starts and ends Ray on this machine", "engine/test_ray.py"),
    r"cascadeinfer stop ": NotRun("ends engines", "cluster/test_ray_keepers.py::test_a_fleet_is_stopped"),
    r"cascadeinfer roll ": NotRun("needs a live server", "engine/test_rolling_live.py"),
    r"cascadeinfer serve\b.*MODEL": NotRun(
        "a placeholder for a model on four or more GPUs; its options are parsed",
        "engine/test_cascade.py::test_24_requests_through_three_stages",
    ),
    r"cascadeinfer serve --instances 2": NotRun(
        "starts engines, as the tests of the server do with these stages; its options are parsed",
        "engine/test_http.py::test_chat_moves_and_stream_agrees",
    ),
    r"cascadeinfer profile MODEL": NotRun(
        "measures for five minutes; its options are parsed", "profiling/test_profiler.py"
    ),
    r"cascadeinfer replay out/live\.jsonl": NotRun("reads the log of a live server", "engine/test_event_log_real.py"),
    r"cascadeinfer doctor --json": NotRun(
        "starts engines, for minutes on a busy machine", "doctor/test_doctor_cli.py::test_on_this_machine"
    ),
    r"cascadeinfer doctor --skip-engines": NotRun(
        "asks engines on other machines", "doctor/test_doctor_doors.py::test_an_engine_answers_and_nobody_does_not"
    ),
    r"cascadeinfer top ": NotRun("needs a live server", "cli/test_top_cli.py"),
    r"curl .*admin/instances": NotRun("needs a live server", "engine/test_http.py::test_an_instance_is_replaced"),
    r"curl -N .*chat/completions": NotRun(
        "needs a live server", "engine/test_http.py::test_chat_moves_and_stream_agrees"
    ),
    r"curl .*metrics \| grep": NotRun("needs a live server", "engine/test_http.py::test_metrics"),
    r"make demo": NotRun("the same demo, as a program", "cli/test_demo.py::test_demo_on_real_engines"),
    r"make (install|test)\b(?!-)": NotRun("is what runs this test; the target is looked up"),
    r"make test-v2": NotRun("minutes with Triton's interpreter, beside the tests; the target is looked up"),
    r"make ENGINE=gpu gpu-check": NotRun(
        "needs a GPU, for 25 minutes; its parts are tested", "tools/test_gpu_check.py"
    ),
    r"make test-ray": NotRun("starts Ray in network namespaces, which takes minutes", "engine/test_ray_faults.py"),
    r"make chaos": NotRun("five minutes; the tests run a short one", "engine/test_chaos.py"),
    r"make figures": NotRun("one to two hours; its parts are tested", "evaluation/test_evaluation_page.py"),
    r"python benchmarks/": NotRun("measures for minutes to hours, on a quiet machine; the program and its flags exist"),
    r"python3\.11 -m venv": NotRun("makes an environment, as `make install` does"),
    r"pip (install|uninstall)": NotRun(
        "changes the environment; extras and packages exist, and the wheel is installed elsewhere",
        "distribution/test_distribution.py::test_bench_works_with_its_extra",
    ),
    r"(podman|docker) ": NotRun("needs a registry of images; the files are checked", "deploy/test_containers.py"),
    r"kubectl ": NotRun("needs a cluster; the objects are checked", "deploy/test_kubernetes.py"),
    r"(useradd|systemctl|install -D) ": NotRun(
        "changes the machine's users and services; the unit is checked", "deploy/test_systemd.py"
    ),
}
RUN = r"cascadeinfer (plan|simulate|replay)\b(?! out/live)|grep -m1|openssl rand"


def reason_of(command: Command) -> list[str]:
    """The patterns of `NOT_RUN` that describe a command."""
    line = " ".join(command.words)
    return [pattern for pattern in NOT_RUN if re.match(pattern, line)]


def runs(command: Command) -> bool:
    """Whether the command is run here."""
    return re.match(RUN, " ".join(command.words)) is not None


def test_every_command_is_run_or_listed() -> None:
    """Each command is run, or has exactly one reason why not; and no reason is left over."""
    unclear = [command.text for command in COMMANDS if len(reason_of(command)) + runs(command) != 1]
    assert unclear == []
    used = {pattern for command in COMMANDS for pattern in reason_of(command)}
    assert set(NOT_RUN) == used


@pytest.mark.parametrize("entry", [entry for entry in NOT_RUN.values() if entry.instead], ids=lambda e: e.instead)
def test_what_runs_instead_exists(entry: NotRun) -> None:
    """The test that a reason names is there."""
    file, _, function = str(entry.instead).partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"def {function}\(" if function else r"def test_", text)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which commands write, with the folder that the pages name."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "out").mkdir()
    return folder


def literal(command: Command) -> list[str]:
    """
    The words to run. Placeholders become what stands for them here: the folder of traces the tests' own, the server's
    log that of the tour, whose request has another id.
    """
    traces = str(ROOT / "tests" / "data" / "traces")
    words = [word.replace("TRACES", traces) for word in command.words[1:]]
    words = ["out/tour.jsonl" if word.startswith("/var/log/") else word for word in words]
    words = ["r20" if word == "chatcmpl-8f" else word for word in words]
    if "TRACES" in command.text:
        words = [FASTER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return words


def run_here(command: Command) -> None:
    """Run it in this process, or as the shell would; raises unless it succeeds."""
    if command.words[0] != "cascadeinfer":
        subprocess.run(["bash", "-c", command.text], check=True, capture_output=True)
        return
    with pytest.raises(SystemExit) as end:
        main(literal(command))
    assert not end.value.code, command.text


def in_order() -> list[Command]:
    """Each command once, the ones that write a log before those that read it."""
    once = {" ".join(command.words): command for command in COMMANDS if runs(command)}
    return sorted(once.values(), key=lambda command: command.words[1] == "replay" or command.words[0] == "grep")


@pytest.mark.parametrize("command", in_order(), ids=lambda command: f"{command.page}: {' '.join(command.words)[:60]}")
def test_commands_run(command: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs to its end with success, as it stands but for placeholders and, where it takes minutes, sizes."""
    monkeypatch.chdir(work)
    run_here(command)


def check_make(command: Command) -> None:
    """The target exists, and what it runs with these words is well formed."""
    words = ["make", "--dry-run", *command.words[1:]]
    recipe = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    checked = subprocess.run(["bash", "-n"], input=recipe, check=True, text=True, capture_output=True)
    assert not checked.stderr  # its exit code does not tell of every error


def check_serve(command: Command) -> None:
    """`serve` takes the options."""
    parsed_by_serve([word for word in command.words[2:] if word != "MODEL"])


def check_profile(command: Command) -> None:
    """`profile` takes the options."""
    pytest.importorskip("vllm")
    from cascadeinfer.cli.profile import parse

    parse(["org/model", *command.words[3:]])


def check_benchmark(command: Command) -> None:
    """The program exists, and each of its flags is written in it or beside it."""
    program = ROOT / command.words[1]
    sources = "".join(path.read_text(encoding="utf-8") for path in {program, *program.parent.glob("*.py")})
    assert program.exists()
    assert [word for word in command.words if word.startswith("--") and f'"{word}"' not in sources] == []


def check_pip(command: Command) -> None:
    """Its extras exist, and other packages are those that the Makefile installs."""
    for word in command.words[2:]:
        for extras in re.findall(r"^(?:\.|cascadeinfer)\[([\w,]+)\]$", word):
            assert set(extras.split(",")) <= set(EXTRAS)
        if re.match(r"^[a-z]", word) and not word.startswith(("cascadeinfer", "https:")):
            assert word in MAKEFILE


def check_file_arguments(command: Command) -> None:
    """The files of the checkout that it names exist."""
    assert [word for word in command.words if word.startswith("deploy/") and not (ROOT / word).exists()] == []


CHECKS: dict[str, Callable[[Command], None]] = {
    "make": check_make,
    "cascadeinfer serve": check_serve,
    "cascadeinfer profile": check_profile,
    "python benchmarks": check_benchmark,
    "pip": check_pip,
    "podman": check_file_arguments,
    "docker": check_file_arguments,
    "kubectl": check_file_arguments,
    "install": check_file_arguments,
}


@pytest.mark.parametrize("beginning", CHECKS)
def test_commands_that_do_not_run_are_valid(beginning: str) -> None:
    """What can be checked of them without running them holds."""
    chosen = {command.words: command for command in COMMANDS if " ".join(command.words).startswith(beginning)}
    assert chosen
    for command in chosen.values():
        CHECKS[beginning](command)


def test_pages_have_commands() -> None:
    """The reader of pages finds them."""
    assert len(COMMANDS) > 50
    assert {"README.md", "docs/tour.md", "docs/operating.md"} <= {command.page for command in COMMANDS}
    assert len(PAGES) > 20
