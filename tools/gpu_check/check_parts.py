"""
Runs the parts of the GPU check, one after another, each in a process of its own and within its share of the time.

A part is a program that appends rows to a file (`row_log.py`). Whatever becomes of it, the parts after it run: a part
that fails, or does not end in time, is recorded with the reason, and its rows so far are kept. A part that is done is
not run again; any other is, and goes on where it was. Time that a part leaves goes to the parts after it, in proportion
to their shares.

`report.json` holds everything and is written after each part, whole or not at all.
"""

import enum
import importlib.util
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from row_log import Row, read_rows, read_settings

from cascadeinfer.loadgen.served_process import ServedProcess, ServerFailedError
from cascadeinfer.results.output_files import replacing

ROOT: Final = Path(__file__).parents[2]
REPORT: Final = "report.json"
REPORT_VERSION: Final = 1
STOP_TIMEOUT_S: Final = 20.0
"""Time for a part to stop what it has started, after SIGTERM; servers and engines included."""
REASON_LINES: Final = 12
"""Lines of a failed part's output that the report quotes."""
REASON_CHARACTERS: Final = 2000


class State(enum.StrEnum):
    """What became of a part."""

    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class Setting:
    """
    What all parts of a run have in common.

    Attributes:
        device: `cuda`, or `cpu` for stand-ins.
        folder: Where results go.
        logs: Where the parts' output goes.
    """

    device: str
    folder: Path
    logs: Path


@dataclass(frozen=True, slots=True)
class Part:
    """
    One part of the check.

    Attributes:
        name: Name of its files.
        title: What it measures.
        minutes: Its share of the time.
        needs: Modules without which it is left out.
        command: Its program; gets the setting, its file of rows and its seconds.
    """

    name: str
    title: str
    minutes: float
    needs: tuple[str, ...]
    command: Callable[[Setting, Path, float], list[str]]

    def rows_file(self, setting: Setting) -> Path:
        """The file of its rows."""
        return setting.folder / f"{self.name}.jsonl"


@dataclass(slots=True)
class Outcome:
    """
    What became of a part.

    Attributes:
        reason: Why it is not done; empty if it is.
        seconds: Time taken, all its runs together.
        command: Its last command.
        settings: What the rows depend on besides the machine; seeds among it.
        rows: What it measured.
    """

    state: State
    reason: str = ""
    seconds: float = 0.0
    command: str = ""
    settings: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def is_importable(module: str) -> bool:
    """Whether a module can be found."""
    return importlib.util.find_spec(module) is not None


def run_parts(
    parts: Sequence[Part],
    setting: Setting,
    machine: Row,
    *,
    seconds: float,
    say: Callable[[str], None],
    now_s: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """
    Run the parts that are not done.

    Args:
        parts: In order.
        setting: Of the run.
        machine: Goes into the report (`machine_facts.py`).
        seconds: For all of them; parts that were done before leave their shares to the others.
        say: Told one line about each part.
        now_s: A clock.

    Returns:
        The outcome of each part, earlier ones included.
    """
    outcomes = read_report(setting.folder)
    missing = [part for part in parts if part.name not in outcomes or outcomes[part.name].state is not State.DONE]
    deadline_s = now_s() + seconds
    for number, part in enumerate(missing):
        share = part.minutes / sum(later.minutes for later in missing[number:])
        limit_s = max(0.0, share * (deadline_s - now_s()))
        before = outcomes.get(part.name)
        say(f"{part.name}: {part.title}, at most {limit_s:.0f} s")
        outcome = _run_part(part, setting, limit_s)
        outcome.rows, outcome.settings = read_rows(part.rows_file(setting)), read_settings(part.rows_file(setting))
        if outcome.state is State.DONE and not outcome.rows:
            outcome.state, outcome.reason = State.FAILED, "it measured nothing"
        outcome.seconds = round(outcome.seconds + (before.seconds if before is not None else 0.0), 1)
        outcomes[part.name] = outcome
        say(f"{part.name}: {outcome.state}, {len(outcome.rows)} rows" + _first_line(outcome.reason))
        write_report(setting.folder, machine, outcomes)
    return outcomes


def _first_line(reason: str) -> str:
    return f" ({reason.splitlines()[0]})" if reason else ""


def _run_part(part: Part, setting: Setting, limit_s: float) -> Outcome:
    """Run a part to its end or to the end of its time."""
    if absent := [name for name in part.needs if not is_importable(name)]:
        return Outcome(State.LEFT_OUT, f"not installed: {', '.join(absent)}")
    if limit_s < 1.0:
        return Outcome(State.TIMED_OUT, "no time was left for it")
    command = part.command(setting, part.rows_file(setting), limit_s)
    process = ServedProcess(
        command, port=0, log=setting.logs / f"{part.name}.log", name=part.name, stop_timeout_s=STOP_TIMEOUT_S
    )
    outcome = Outcome(State.DONE, command=_shown(command))
    begun_s = time.monotonic()
    try:
        with process:
            code = process.wait_ended(limit_s)
        if code:
            outcome.state, outcome.reason = State.FAILED, f"exit code {code}\n{_tail(process.log)}"
    except ServerFailedError as error:
        outcome.state, outcome.reason = State.TIMED_OUT, f"{error.reason}\n{_tail(process.log)}"
    outcome.seconds = round(time.monotonic() - begun_s, 1)
    return outcome


def _shown(command: Sequence[str]) -> str:
    """A command as the operator would type it in the checkout."""
    words = ["python" if word == sys.executable else word.removeprefix(f"{ROOT}/") for word in command]
    return shlex.join(words)


def _tail(log: Path) -> str:
    """The end of a part's output, without the paths of this machine's folders."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    text = "\n".join(lines[-REASON_LINES:])[-REASON_CHARACTERS:]
    return re.sub(r"(/[\w.+-]+){2,}/", ".../", text)


def read_report(folder: Path) -> dict[str, Outcome]:
    """The outcomes of earlier runs in a folder."""
    found = _report(folder).get("parts", {})
    return {name: Outcome(**{**values, "state": State(values["state"])}) for name, values in found.items()}


def machine_before(folder: Path) -> Row | None:
    """The machine whose results are in a folder; None if there are none."""
    machine: Row | None = _report(folder).get("machine")
    return machine


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def write_report(folder: Path, machine: Row, outcomes: dict[str, Outcome], table: str = "") -> Path:
    """Write everything as one file. Raises ConfigError if that is impossible."""
    content = {
        "version": REPORT_VERSION,
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine,
        "parts": {
            name: {
                "state": str(outcome.state),
                "reason": outcome.reason,
                "seconds": outcome.seconds,
                "command": outcome.command,
                "settings": outcome.settings,
                "rows": outcome.rows,
            }
            for name, outcome in outcomes.items()
        },
        "table": table.splitlines(),
    }
    with replacing(folder / REPORT, "--out") as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")
    return folder / REPORT
