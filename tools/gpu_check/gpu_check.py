"""
What can be measured in 25 minutes on a machine with one GPU.

    make ENGINE=gpu gpu-check [ARGS="--minutes 25 --only kernels,steps --again"]
    python tools/gpu_check/gpu_check.py [--device cpu] ...

Five parts: attention kernels on mixed and equal lengths; step times of a batch beside prompt tokens, on a real engine;
whether moved requests keep their text; the pause of a move; this server against vLLM's own data parallelism. Results go
to `profiles/measured/GPU/`: a file of rows per part, a measured cost profile per way of running the engine
(`cascadeinfer plan --profile FILE` takes it), and `report.json`, which has everything in one file.

`--device cpu` runs the same programs on stand-ins, with tiny sizes: a check of this check, no measurement. Its results
go to `out/gpu-check/`.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from check_parts import (
    Outcome,
    Part,
    Setting,
    State,
    machine_before,
    read_report,
    run_parts,
    write_report,
)
from check_tables import table_of

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.results.provenance import own_commit

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
EXIT_UNMEASURED: Final = 1
EXIT_OPERATOR: Final = 2
EXIT_INTERRUPTED: Final = 130
MINUTES: Final = 25.0
FACTS_TIMEOUT_S: Final = 300.0
SAME: Final = ("kind", "device", "versions")
"""What may not differ between the runs whose results lie in one folder."""


def program(module: str, setting: Setting, rows_file: Path, seconds: float) -> list[str]:
    """The command of a part."""
    return [
        sys.executable, str(HERE / "part.py"), module, "--device", setting.device, "--rows", str(rows_file),
        "--logs", str(setting.logs), "--seconds", f"{seconds:.0f}",
    ]  # fmt: skip


def part(name: str, module: str, title: str, minutes: float, *needs: str) -> Part:
    """A part whose module lies beside this file."""
    return Part(name, title, minutes, needs, lambda *given: program(module, *given))


PARTS: Final = (
    part("kernels", "kernel_times", "attention kernels, mixed against equal lengths", 6.0, "torch"),
    part("steps", "step_times", "step times beside prompt tokens, and a cost profile", 7.0, "vllm", "nixl"),
    part("moves", "move_texts", "texts of moved requests", 4.0, "vllm", "nixl"),
    part("pause", "move_pause", "pause of a move: pull against recompute", 3.0, "vllm", "nixl"),
    part("serving", "serving", "four instances on the GPU against vLLM's own balancing", 5.0, "vllm", "nixl"),
)


def machine_of(device: str) -> dict[str, Any]:
    """
    The machine and its software.

    Raises:
        ConfigError: Something is missing.
    """
    command = [sys.executable, str(HERE / "machine_facts.py"), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FACTS_TIMEOUT_S, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[1]} ended with {done.returncode}"]
        raise ConfigError(lines[-1])
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**facts, "commit": own_commit()}


def folder_of(machine: dict[str, Any]) -> Path:
    """Where results go if `--out` does not say."""
    if machine["kind"] == "cpu":
        return ROOT / "out" / "gpu-check"
    return ROOT / "profiles" / "measured" / re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def differs_from(folder: Path, machine: dict[str, Any]) -> list[str]:
    """In what the machine differs from the one whose results are in the folder."""
    before = machine_before(folder)
    return [] if before is None else [name for name in SAME if before.get(name) != machine.get(name)]


def chosen_parts(only: str | None, parts: Sequence[Part]) -> list[Part]:
    """
    The parts to run, in their order.

    Raises:
        ConfigError: A name is unknown.
    """
    names = [part.name for part in parts] if only is None else only.split(",")
    if unknown := set(names) - {part.name for part in parts}:
        raise ConfigError(
            f"no part is called {', '.join(sorted(unknown))}",
            option="--only",
            fix=f"there are: {', '.join(part.name for part in parts)}",
        )
    return [part for part in parts if part.name in names]


def forget(folder: Path, parts: Sequence[Part], setting: Setting, machine: dict[str, Any]) -> None:
    """Remove what these parts have measured before."""
    for old in parts:
        old.rows_file(setting).unlink(missing_ok=True)
        for file in folder.glob(f"{old.name}-*"):
            file.unlink()
    kept = {name: outcome for name, outcome in read_report(folder).items() if name not in {old.name for old in parts}}
    write_report(folder, machine, kept)


def finish(folder: Path, machine: dict[str, Any], outcomes: dict[str, Outcome]) -> int:
    """Print the table and write the report; returns the exit code."""
    table = table_of(machine, outcomes)
    report = write_report(folder, machine, outcomes, table)
    print(table)
    wish = "Stand-ins on a processor: no measurement." if machine["kind"] == "cpu" else "Please attach it to an issue."
    print(f"\nEverything is in {report}. {wish}")
    return 0 if all(outcome.state is State.DONE for outcome in outcomes.values()) else EXIT_UNMEASURED


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raises ConfigError for numbers that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: stand-ins, tiny sizes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--only", help=f"of the parts {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--again", action="store_true", help="measure anew what is in the folder")
    options = parser.parse_args(words)
    if not 0.0 < options.minutes <= 24 * 60.0:
        raise ConfigError("must be positive, at most a day", option="--minutes")
    return options


def check(words: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    """
    Run; returns the exit code.

    Raises:
        ConfigError: Something is missing, or an option is wrong; nothing has been measured.
    """
    options = parse(words)
    chosen = chosen_parts(options.only, parts)
    machine = machine_of(options.device)
    folder = (options.out or folder_of(machine)).resolve()
    setting = Setting(options.device, folder, folder / "logs")
    different = differs_from(folder, machine)
    if different and not options.again:
        raise ConfigError(
            f"{folder} has results of another machine or of other versions ({', '.join(different)})",
            option="--out",
            fix="name another folder, or measure everything anew by --again",
        )
    try:
        for path in (folder, setting.logs):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be made: {error.strerror}", option="--out") from error
    if options.again:
        forget(folder, parts if different else chosen, setting, machine)
    outcomes = run_parts(chosen, setting, machine, seconds=60.0 * options.minutes, say=tell)
    return finish(folder, machine, outcomes)


def tell(line: str) -> None:
    """Progress, on standard error."""
    print(f"gpu-check: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Run, and exit with the code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is stopped
    try:
        sys.exit(check(sys.argv[1:]))
    except ConfigError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        sys.exit(EXIT_OPERATOR)
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from here")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
