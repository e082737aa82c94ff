"""
`cascadeinfer doctor`: whether this machine can serve with live moves, a verdict per line with the fix.

Exit code 0 if nothing is at fault, 1 if something is, 2 for a wrong option, 130 after Ctrl-C.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.results.output_files import check_output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.text import Text

    from cascadeinfer.doctor.examining import Examination
    from cascadeinfer.doctor.verdicts import Check, Verdict

EXIT_FAULT: Final = 1
EXIT_INTERRUPTED: Final = 130
NAME_COLUMNS: Final = 18
VERDICT_COLUMNS: Final = 9
FEWEST_COLUMNS: Final = 40
"""For what was found; a narrower terminal wraps by itself."""
STYLES: Final = {"ok": "green", "warning": "yellow", "fault": "bold red", "not applicable": "dim"}
SHORT: Final = {"not applicable": "-"}


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    app.command(name, help=help_text)(doctor)


def doctor(
    *,
    skip_engines: Annotated[
        bool, typer.Option("--skip-engines", help="Start no instances: only what can be asked in seconds.")
    ] = False,
    engines: Annotated[
        str | None,
        typer.Option(help="Engines that others have started, as HOST:PORT,HOST:PORT: ask at their doors, too."),
    ] = None,
    cluster_key: Annotated[
        Path | None, typer.Option(help="With --engines: the file with the key that they have.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on which the server would listen.")] = 8000,
    patience: Annotated[
        float, typer.Option(min=1, max=100, help="Factor on all time limits, for slow machines.")
    ] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write a report with all verdicts and facts, to attach to an issue.")
    ] = None,
) -> None:
    """
    Examine this machine: driver, devices, versions, transports, limits, ports; then two small instances with moves in
    both directions. Needs no model. Each line has a verdict, and the fix where one is needed.
    """
    from cascadeinfer.cli.extras import installation
    from cascadeinfer.doctor.examining import Examination, Wishes

    wishes = Wishes(
        installation("engine"), port, _engines(engines, cluster_key), cluster_key, not skip_engines, patience
    )
    if json_file is not None:
        check_output(json_file, "--json")
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tempfile.TemporaryDirectory(prefix="cascadeinfer-doctor-") as folder:
            code = _run(Examination(wishes, Path(folder), dict(os.environ)), json_file)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing is left running\n")
        code = EXIT_INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise typer.Exit(code)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """End what was started, which takes some seconds; a second signal kills it."""
    sys.stderr.write("stopping what was started (once more: at once)\n")
    raise KeyboardInterrupt


def _engines(engines: str | None, cluster_key: Path | None) -> tuple[str, ...]:
    """
    The engines' addresses, checked.

    Raises:
        ConfigError: One is none, or the key cannot be read, or one option lacks the other.
    """
    if engines is None:
        if cluster_key is not None:
            raise ConfigError("has no effect without engines", option="--cluster-key", fix="add --engines HOST:PORT")
        return ()
    if cluster_key is None:
        raise ConfigError("needs the key that they have", option="--engines", fix="add --cluster-key FILE")
    from cascadeinfer.cluster.addresses import host_and_port
    from cascadeinfer.cluster.shared_key import ClusterKey

    texts = tuple(engines.split(","))
    for text in texts:
        host_and_port(text, "--engines")
    ClusterKey.read(cluster_key, "--cluster-key")
    return texts


def _run(examination: "Examination", json_file: Path | None) -> int:
    """Examine, print, write the report; returns the exit code."""
    from cascadeinfer.cli.tables import console
    from cascadeinfer.doctor.report import report_of, write_report
    from cascadeinfer.doctor.verdicts import Verdict, counted

    out = console()
    found: dict[str, list[Check]] = {}
    with out.status("") as status:  # nothing where there is no terminal
        for section in examination.sections():
            out.print(f"[bold]{section.title}[/bold]", highlight=False)
            status.update(f"examining {section.title} (Ctrl-C ends)")
            found[section.title] = []
            for check in section.checks:
                found[section.title].append(check)
                out.print(line_of(check, out.width), soft_wrap=True)
    counts = counted(check for some in found.values() for check in some)
    out.print(f"\n{summary(counts)}", highlight=False, markup=False)
    if json_file is not None:
        write_report(
            json_file, report_of(found, examination.gathered, ["cascadeinfer", *sys.argv[1:]]), examination.environment
        )
        out.print(f"report: {json_file}; attach it to an issue", highlight=False, markup=False)
    return EXIT_FAULT if counts[Verdict.FAULT] else 0


def line_of(check: "Check", columns: int) -> "Text":
    """
    A check as the terminal shows it: verdict, name, what was found, and below it the fix.

    Args:
        check: The check.
        columns: Width of the terminal.
    """
    from rich.text import Text

    verdict = str(check.verdict)
    line = Text("  ").append(f"{SHORT.get(verdict, verdict):<{VERDICT_COLUMNS}}", STYLES[verdict])
    line.append(f"{check.name:<{NAME_COLUMNS}} ")
    width = max(FEWEST_COLUMNS, columns - len(line))
    texts = [check.found, *([f"fix: {check.fix}"] if check.fix else [])]
    rows = [row for text in texts for row in wrap(text, width, break_on_hyphens=False, break_long_words=False)]
    return line.append(("\n" + " " * len(line)).join(rows))


def summary(counts: "Mapping[Verdict, int]") -> str:
    """How many there are of each verdict."""
    from cascadeinfer.doctor.verdicts import Verdict

    faults, warnings = counts.get(Verdict.FAULT, 0), counts.get(Verdict.WARNING, 0)
    told = [
        f"{counts.get(Verdict.OK, 0)} ok",
        f"{warnings} warning{'' if warnings == 1 else 's'}",
        f"{faults} fault{'' if faults == 1 else 's'}",
        f"{counts.get(Verdict.NOT_APPLICABLE, 0)} not applicable",
    ]
    return ", ".join(told)
