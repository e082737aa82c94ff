"""
Runs a part in a process of its own, within a time limit.

Whatever the part does (hangs, is killed for its memory, crashes in a library), its facts so far count, and nothing of
it is left running.
"""

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cascadeinfer.doctor.facts import Doing, End, Gathered
from cascadeinfer.doctor.gathering.notes import read_notes
from cascadeinfer.loadgen.served_process import ServedProcess, ServerFailedError

PROGRAM: Final = ("-P", "-c", "from cascadeinfer.doctor.gathering.parts import main; main()")
"""`-P`: a file in the working folder must not stand for a package."""
STOP_TIMEOUT_S: Final = 20.0
"""Time for a part to stop its instances; what is left then is killed."""
TAIL_LINES: Final = 200
"""Of a part that failed: vLLM names the cause well before the end."""
TOLD_BY_UCX: Final = re.compile(r"^\[[\d.]+\] \[[^]]*\]\s+(?:[|+]|.*\bUCX  INFO\b)")
"""What UCX was asked to say of itself, which would push the reason of a failure out."""
LOG: Final = "LOG"


def gather(
    part: str,
    words: Sequence[str],
    folder: Path,
    limit_s: float,
    *,
    environment: Mapping[str, str] | None = None,
    program: Callable[[str, Path], Sequence[str]] | None = None,
) -> Gathered:
    """
    Run a part.

    Args:
        part: Its name.
        words: Its arguments; `LOG` stands for the file of its output.
        folder: For its files.
        limit_s: Its time limit.
        environment: Variables for it, added to this process's own.
        program: Makes its command from its name and file, instead of ours.
    """
    file, log = folder / f"{part}.jsonl", folder / f"{part}.log"
    command = [sys.executable, *PROGRAM, part, str(file)] if program is None else list(program(part, file))
    process = ServedProcess(
        [*command, *(str(log) if word == LOG else word for word in words)],
        port=0,
        log=log,
        name=part,
        environment=environment,
        stop_timeout_s=STOP_TIMEOUT_S,
    )
    begun_s = time.monotonic()
    end, code = End.DONE, 0
    with process:
        try:
            code = process.wait_ended(limit_s)
        except ServerFailedError:
            end = End.TIMED_OUT
    if end is End.DONE and code:
        end = End.FAILED
    facts = read_notes(file)
    told = [fact.what for fact in facts if isinstance(fact, Doing)]
    return Gathered(
        part,
        end,
        tuple(fact for fact in facts if not isinstance(fact, Doing)),
        told[-1] if told else "",
        code,
        round(time.monotonic() - begun_s, 1),
        limit_s,
        "" if end is End.DONE else _end_of(log),
    )


def _end_of(log: Path) -> str:
    """The end of a part's output."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if not TOLD_BY_UCX.match(line)][-TAIL_LINES:])
