"""The command: wrong options, exit codes, how lines look; a machine without vLLM; and the whole on this machine."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from made_up_facts import (
    BACKEND,
    CARRIERS,
    DEVICES,
    DOOR,
    HOST,
    INSTALL,
    MACHINE,
    MIXED,
    MOVE,
    NIXL,
    NO_DEVICES,
    SOFTWARE,
    STARTED,
)
from msgspec.structs import replace

from cascadeinfer import __version__
from cascadeinfer.cli import main as entry
from cascadeinfer.cli.doctor import line_of, summary
from cascadeinfer.doctor import examining
from cascadeinfer.doctor.examining import Examination, Wishes
from cascadeinfer.doctor.facts import End, Fact, Gathered
from cascadeinfer.doctor.verdicts import Check, Verdict, counted, fault, ok

WORDS = [sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "doctor"]
ALL_WELL: dict[str, tuple[Fact, ...]] = {
    "name": (HOST,),
    "machine": (MACHINE,),
    "software": (SOFTWARE, NIXL),
    "devices": (DEVICES, BACKEND),
    "doors": (replace(DOOR, version=__version__),),
    "trial": (STARTED, MOVE, replace(MOVE, source="1", target="0"), replace(MOVE, context_tokens=600), CARRIERS),
    "kernels": (MIXED,),
}


class MadeUp:
    """
    Stands for the parts' processes.

    Attributes:
        facts: Of each part.
        ran: Parts that were asked for, with their words, limits and environments.
    """

    def __init__(self, facts: Mapping[str, tuple[Fact, ...]]) -> None:
        self.facts = facts
        self.ran: dict[str, tuple[Sequence[str], float, Mapping[str, str] | None]] = {}
        self.failing: dict[str, Gathered] = {}

    def gather(
        self,
        part: str,
        words: Sequence[str],
        folder: Path,  # noqa: ARG002 - nothing is written
        limit_s: float,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Gathered:
        """What the part brought."""
        self.ran[part] = (words, limit_s, environment)
        return self.failing.get(part) or Gathered(part, End.DONE, self.facts[part])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """Parts of a machine with one GPU, on which all is well."""
    made = MadeUp(dict(ALL_WELL))
    monkeypatch.setattr(examining, "gather", made.gather)
    return made


def checks_of(wishes: Wishes, environment: Mapping[str, str] | None = None) -> dict[str, list[Check]]:
    """Examine."""
    examination = Examination(wishes, Path("/nowhere"), environment or {})
    return {section.title: list(section.checks) for section in examination.sections()}


def flat(sections: Mapping[str, list[Check]]) -> Iterator[Check]:
    """All checks."""
    for checks in sections.values():
        yield from checks


def end_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, output and errors of the command in this process."""
    with pytest.raises(SystemExit) as end:
        entry.main(["doctor", *words])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_all_is_well(parts: MadeUp) -> None:
    """Every part runs, in order, and no line has anything to mend."""
    sections = checks_of(Wishes(INSTALL, 8000, ("10.0.0.7:7300",), Path("key")))
    assert list(sections) == [
        "this machine", "software", "devices and transports", "engines that run", "two instances"
    ]  # fmt: skip
    assert list(parts.ran) == ["name", "machine", "software", "devices", "doors", "trial", "kernels"]
    assert {check.verdict for check in flat(sections)} == {Verdict.OK}
    assert parts.ran["machine"][0] == ("8000",)
    assert parts.ran["doors"][0] == ("key", "10.0.0.7:7300")


def test_what_the_operator_has_set_stays(parts: MadeUp) -> None:
    """Of the variables for the trial; and patience is a factor on the limits."""
    checks_of(Wishes(INSTALL, 8000, patience=3.0), {"UCX_LOG_FILE": "/tmp/mine"})  # noqa: S108 - not written
    _, limit_s, environment = parts.ran["trial"]
    assert limit_s == 3.0 * examining.LIMITS_S["trial"]
    assert environment is not None
    assert "UCX_LOG_FILE" not in environment
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment, "a setting for processors"


def test_on_a_processor_no_kernel_is_timed_by_itself(parts: MadeUp) -> None:
    """The trial's steps stand for it."""
    parts.facts = {**ALL_WELL, "devices": (NO_DEVICES, BACKEND), "trial": (*ALL_WELL["trial"], MIXED)}
    sections = checks_of(Wishes(INSTALL, 8000))
    assert "kernels" not in parts.ran
    assert sections["two instances"][-1].name == "mixed lengths"
    environment = parts.ran["trial"][2]
    assert environment is not None
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_without_vllm_the_static_part_runs_and_says_so(parts: MadeUp) -> None:
    """With the command that installs it."""
    parts.facts = {
        **ALL_WELL,
        "software": (replace(SOFTWARE, versions={"cascadeinfer": "0.1.0"}),),
        "devices": (replace(NO_DEVICES, torch=""),),
    }
    sections = checks_of(Wishes(INSTALL, 8000))
    assert "trial" not in parts.ran
    assert sections["two instances"] == [
        Check("instances", Verdict.NOT_APPLICABLE, "not started: vLLM is not installed")
    ]
    (vllm,) = [check for check in sections["software"] if check.name == "vLLM"]
    assert (vllm.verdict, vllm.fix) == (Verdict.FAULT, INSTALL)


@pytest.mark.parametrize("part", ["name", "machine", "software", "devices", "trial", "kernels"])
def test_a_part_that_hangs_does_not_stop_the_others(parts: MadeUp, part: str) -> None:
    """It is a fault, and what follows without its facts is examined."""
    parts.failing[part] = Gathered(part, End.TIMED_OUT, limit_s=45.0, doing="something")
    checks = list(flat(checks_of(Wishes(INSTALL, 8000))))
    assert [check.found for check in checks if check.verdict is Verdict.FAULT] == [
        "no end within 45 s while something; it was stopped"
    ]
    assert {"devices", "machine"} <= parts.ran.keys()


def test_exit_codes(parts: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 when nothing is at fault, 1 when something is; the report has the same."""
    report = tmp_path / "report.json"
    code, out, errors = end_of(["--json", str(report)], capsys)
    assert (code, errors) == (0, "")
    found = json.loads(report.read_text())["verdicts"]
    assert list(found) == ["ok"]
    assert f"{found['ok']} ok, 0 warnings, 0 faults, 0 not applicable" in out
    parts.facts = {**ALL_WELL, "name": (replace(HOST, addresses=[], error="unknown"),)}
    code, out, _ = end_of([], capsys)
    assert code == 1
    assert "1 fault," in out
    assert "fix: echo '127.0.1.1 node7'" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "10.0.0.7"], "'10.0.0.7' is not HOST:PORT"),
        (["--engines", "10.0.0.7:7300"], "--engines: needs the key"),
        (["--cluster-key", "KEY"], "--cluster-key: has no effect"),
        (["--engines", "10.0.0.7:7300", "--cluster-key", "/nowhere/key"], "--cluster-key: cannot read"),
        (["--json", "/nowhere/report.json"], "--json: there is no folder"),
    ],
)
def test_wrong_options_end_in_one_line(
    parts: MadeUp, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, before anything is examined."""
    key = tmp_path / "key"
    key.write_text("k" * 40)
    words = [str(key) if word == "KEY" else word for word in words]
    if words == ["--engines", "10.0.0.7"]:
        words += ["--cluster-key", str(key)]
    code, out, errors = end_of(words, capsys)
    assert (code, out, parts.ran) == (2, "", {})
    assert errors.startswith("cascadeinfer: error: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("words", [["--port", "0"], ["--patience", "0.5"], ["--unknown"]])
def test_values_out_of_bounds(parts: MadeUp, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Refused by the parser."""
    code, _, _ = end_of(words, capsys)
    assert (code, parts.ran) == (2, {})


def test_lines_wrap_below_what_was_found() -> None:
    """And a fix has a line of its own."""
    text = line_of(fault("memory", "one two three " * 8, "buy some"), 80).plain
    lines = text.split("\n")
    assert lines[0].startswith("  fault    memory             one two")
    assert all(line.startswith(" " * 30) and len(line) <= 80 for line in lines[1:])
    assert lines[-1].strip() == "fix: buy some"
    assert line_of(ok("a", "b"), 80).plain.count("\n") == 0
    assert summary(counted([ok("a", "b"), fault("a", "b", "c")])) == "1 ok, 0 warnings, 1 fault, 0 not applicable"


@pytest.mark.engine
@pytest.mark.timeout(3000)
def test_on_this_machine(tmp_path: Path) -> None:
    """The whole command with two real instances: nothing is at fault, and nothing is left running."""
    report = tmp_path / "report.json"
    result = subprocess.run(
        [*WORDS, "--patience", "8", "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
        # The path of vLLM's sockets must stay short.
        env=os.environ | {"TMPDIR": str(tmp_path), "VLLM_RPC_BASE_PATH": tempfile.gettempdir(), "MY_API_KEY": "k" * 9},
    )
    found = json.loads(report.read_text())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fault" not in found["verdicts"], result.stdout
    assert {name: part["end"] for name, part in found["parts"].items()} == dict.fromkeys(
        ["name", "machine", "software", "devices", "trial"], "done"
    )
    facts = found["parts"]["trial"]["facts"]
    moves = [fact for fact in facts if fact["type"] == "Move"]
    assert {(move["source"], move["target"]) for move in moves} == {("0", "1"), ("1", "0")}
    assert all(move["pulled"] and move["differs_at"] is None and move["tokens"] == 96 for move in moves)
    (mixed,) = [fact for fact in facts if fact["type"] == "Mixed"]
    assert (mixed["ratio"] > 0.0, mixed["error"]) == (True, "")
    (carriers,) = [fact for fact in facts if fact["type"] == "Carriers"]
    assert set(carriers["transports"]) & {"cma", "tcp", "sysv", "posix"}
    assert "k" * 9 not in report.read_text()
    assert not list(tmp_path.glob("cascadeinfer-*")), "its folder is removed"
    left = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in left if str(tmp_path) in line], "an instance has been left running"
