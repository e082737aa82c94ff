"""The GPU check runs all its parts whatever becomes of one, keeps what is measured, and ends with a table."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu_check"))

from check_parts import Outcome, Part, Setting, State, read_report, run_parts
from check_tables import table_of
from row_log import OtherSettingsError, RowLog, read_rows

import gpu_check
from cascadeinfer.core.errors import ConfigError

HERE = Path(__file__).parents[2] / "tools" / "gpu_check"
MACHINE = {"kind": "cpu", "device": "a processor", "versions": {"torch": "1"}}
WRITE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from row_log import RowLog
log = RowLog(Path(sys.argv[1]), {{"of": "a test"}})
"""
GOOD = WRITE + "log.add('one', value=1)"
FAILS = WRITE + "log.add('half', value=1); raise SystemExit('the kernel /opt/some/where/file.py is missing')"
HANGS = (
    WRITE
    + """
import subprocess, time
log.has('half') or log.add('half', value=1)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=False)
time.sleep(1000)
"""
)
STUBBORN_S = 4.0
"""Seconds for a part that hangs; others need a fraction of a second, or what a busy machine makes of it."""


def fake(name: str, program: str, *, minutes: float = 1.0, needs: tuple[str, ...] = ()) -> Part:
    """A part that runs a Python text."""
    return Part(name, f"fake {name}", minutes, needs, lambda _, rows, __: [sys.executable, "-c", program, str(rows)])


@dataclass
class Clock:
    """A clock that tells chosen times; the last one from then on."""

    times: list[float] = field(default_factory=lambda: [0.0])

    def __call__(self) -> float:
        """The time."""
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A run in an empty folder."""
    return Setting("cpu", tmp_path, tmp_path)


def run(
    setting: Setting, *parts: Part, seconds: float = 600.0, clock: Callable[[], float] | None = None
) -> dict[str, Outcome]:
    """Run parts; what is said goes nowhere."""
    return run_parts(
        parts, setting, MACHINE, seconds=seconds, say=lambda _: None, now_s=clock if clock is not None else Clock()
    )


def test_a_part_that_fails_does_not_end_the_others(setting: Setting) -> None:
    """Its rows and the end of its output are kept, without the paths of the machine; the next part runs."""
    outcomes = run(setting, fake("bad", FAILS), fake("good", GOOD))
    assert outcomes["bad"].state is State.FAILED
    assert "exit code 1" in outcomes["bad"].reason
    assert "the kernel .../file.py is missing" in outcomes["bad"].reason
    assert [row["key"] for row in outcomes["bad"].rows] == ["half"]
    assert outcomes["good"].state is State.DONE
    assert read_report(setting.folder) == outcomes


def test_a_part_out_of_time_is_stopped_with_all_that_it_started(setting: Setting) -> None:
    """It is recorded as timed out; its rows are kept."""
    share = fake("hangs", HANGS, minutes=STUBBORN_S)
    outcomes = run(setting, share, fake("good", GOOD, minutes=600.0 - STUBBORN_S))
    assert outcomes["hangs"].state is State.TIMED_OUT
    assert outcomes["good"].state is State.DONE
    assert not [line for line in processes_with(str(setting.folder)) if "hangs.jsonl" in line]


def processes_with(word: str) -> list[str]:
    """Command lines of living processes that contain a word."""
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if word in line and "ps -eo" not in line]


def test_time_that_a_part_leaves_goes_to_the_later_ones(setting: Setting) -> None:
    """Shares are of what is left; a part for which nothing is left is recorded, not run."""
    told: list[str] = []
    clock = Clock([0.0, 0.0, 100.0, 400.0])
    parts = [fake("a", GOOD, minutes=1.0), fake("b", GOOD, minutes=1.0), fake("c", GOOD, minutes=2.0)]
    outcomes = run_parts(parts, setting, MACHINE, seconds=400.0, say=told.append, now_s=clock)
    limits = [int(found.group(1)) for line in told if (found := re.search(r"at most (\d+) s", line))]
    assert limits == [100, 100, 0]
    assert [outcome.state for outcome in outcomes.values()] == [State.DONE, State.DONE, State.TIMED_OUT]
    assert outcomes["c"].reason == "no time was left for it"


def test_what_is_done_is_not_run_again(setting: Setting) -> None:
    """Only the parts that are not done are run again, and they go on with their rows."""
    first = run(setting, fake("good", GOOD), fake("bad", FAILS))
    again = WRITE + "assert log.has('half'); log.add('whole', value=2)"
    second = run(setting, fake("good", "raise SystemExit('run again')"), fake("bad", again))
    assert second["good"] == first["good"]
    assert second["bad"].state is State.DONE
    assert [row["key"] for row in second["bad"].rows] == ["half", "whole"]
    assert second["bad"].seconds >= first["bad"].seconds


def test_a_part_without_its_packages_is_left_out(setting: Setting) -> None:
    """What is missing is named."""
    outcomes = run(setting, fake("rare", GOOD, needs=("sys", "no_such_module")))
    assert outcomes["rare"].state is State.LEFT_OUT
    assert outcomes["rare"].reason == "not installed: no_such_module"


def test_a_part_that_measures_nothing_has_failed(setting: Setting) -> None:
    """Exit code 0 without a row is no success."""
    assert run(setting, fake("idle", WRITE))["idle"].state is State.FAILED


def test_rows_survive_an_interruption(tmp_path: Path) -> None:
    """A line that was cut short is dropped and measured again; rows of other settings are refused."""
    path = tmp_path / "rows.jsonl"
    with RowLog(path, {"seed": 1}) as log:
        log.add("one", value=1)
        log.add("two", value=2)
    path.write_bytes(path.read_bytes()[:-5])
    assert [row["key"] for row in read_rows(path)] == ["one"]
    with RowLog(path, {"seed": 1}) as log:
        assert log.has("one")
        assert not log.has("two")
        log.add("two", value=2)
    assert [row["value"] for row in read_rows(path)] == [1, 2]
    with pytest.raises(OtherSettingsError):
        RowLog(path, {"seed": 2})


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The check on a machine that is given, with one good part."""

    def check(*words: str, machine: dict[str, Any] = MACHINE) -> int:
        monkeypatch.setattr(gpu_check, "machine_of", lambda device: {**machine, "kind": device, "commit": None})
        return gpu_check.check(words, [fake("good", GOOD), fake("other", GOOD)])

    return check


def test_the_command_writes_one_report(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report has machine, rows and table; the table is printed; exit code 0 if all parts are done."""
    assert command("--device", "cpu", "--out", str(tmp_path)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    printed = capsys.readouterr().out
    assert report["machine"]["device"] == "a processor"
    assert report["parts"]["good"]["rows"][0]["value"] == 1
    assert report["parts"]["good"]["settings"] == {"of": "a test"}
    assert "\n".join(report["table"]) in printed
    assert "no measurement" in printed


def test_results_of_another_machine_are_not_added_to(command: Callable[..., int], tmp_path: Path) -> None:
    """Other versions in the folder are refused; `--again` removes what was measured with them, whatever `--only`."""
    words = ("--device", "cpu", "--out", str(tmp_path))
    command(*words)
    other = {**MACHINE, "versions": {"torch": "2"}}
    with pytest.raises(ConfigError, match=r"--out: .*other versions \(versions\)"):
        command(*words, machine=other)
    assert command(*words, "--again", "--only", "good", machine=other) == 0
    assert list(read_report(tmp_path)) == ["good"]
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--only", "kernels,none"), "--only: no part is called kernels, none"), (("--minutes", "0"), "--minutes")],
)
def test_bad_options_are_refused(command: Callable[..., int], words: tuple[str, ...], message: str) -> None:
    """Before anything is measured."""
    with pytest.raises(ConfigError, match=message):
        command("--device", "cpu", *words)


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    """One line, exit code 2, nothing written."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, HERE / "gpu_check.py", "--out", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == gpu_check.EXIT_OPERATOR
    assert re.fullmatch(r"gpu-check: no GPU [^\n]+\n", done.stderr)
    assert not (tmp_path / "none").exists()


def test_every_part_of_the_check_exists() -> None:
    """Its module lies in the folder, and its rows have a table."""
    table = table_of(MACHINE, {part.name: Outcome(State.FAILED, "a\nb") for part in gpu_check.PARTS})
    for part in gpu_check.PARTS:
        words = part.command(Setting("cuda", Path("out"), Path("logs")), Path("rows"), 60.0)
        assert (HERE / f"{words[2]}.py").is_file()
        assert f"| {part.name} | failed | 0 | 0 | a |" in table
    assert sum(part.minutes for part in gpu_check.PARTS) == gpu_check.MINUTES


def test_the_table_shows_measured_and_predicted() -> None:
    """Kernels by prompt, steps, moves, pauses and systems, each with its figures."""
    pair = {"kernel": "FA3", "batch": "mix", "kv_heads": 8}
    kernels = [
        {"key": f"{page}, {prompt}", **pair, "prompt_tokens": prompt, "ratio": ratio, "predicted": predicted}
        for page, prompt, ratio, predicted in ((16, 0, 1.1, 1.03), (64, 0, 1.3, 1.03), (16, 512, 2.0, None))
    ]
    moved = {"tokens": 64, "pinned": "seeded_sampling", "runner": "V1", "case": "seeded"}
    moves = [
        {"key": "1", **moved, "way": "no move", "moves": 0, "same": True, "differs_at": None},
        {"key": "2", **moved, "way": "pull", "moves": 2, "same": False, "differs_at": 9},
    ]
    group = {"requests": 7, "failed": 1, "ttft_s_mean": 0.5, "tpot_s_mean": None, "e2e_s_mean": 2.0, "e2e_s_p99": 3.0}
    serving = [{"key": "s", "system": "ours", "all": {**group, "throughput_tokens_per_s": 100.0}}]
    rows = {"kernels": kernels, "moves": moves, "serving": serving}
    table = table_of(MACHINE, {name: Outcome(State.DONE, rows=part) for name, part in rows.items()})
    assert "| FA3 | mix | 8 | 1.20 (1.03) | 2.00 |" in table
    assert "| seeded | same | differs from token 9 of 64 | - | seeded_sampling (V1) |" in table
    assert "| ours | all | 1 | 7 | 1 | 500 | - | 2.00 | 3.00 | 100 |" in table
