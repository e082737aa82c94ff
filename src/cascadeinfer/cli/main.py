"""
The entry point of the command line: a table of commands, of which only the chosen one is loaded.

`COMMANDS` gives each command its module and its line of help. The module has one of

    def register(app: typer.Typer, name: str, help_text: str) -> None
    def FUNCTION(arguments: list[str]) -> None

`register` adds the command to `app` under that name (`app.command(name, help=help_text)(function)`, or `app.add_typer`
if it has subcommands). A row that names a function is for commands with their own parser, such as vLLM's with its
hundreds of flags: the function receives all words after the command's name, `--help` included.

Engines take seconds to import, so only the chosen command's module is imported. The list of commands imports none: the
others appear there with their line of the table. Completion in the shell (`completion.py`) follows the same rule.

An operator's mistake ends in one line on standard error and exit code 2, an engine's failure in one line and exit code
1. A package that belongs to an extra is such a mistake: the line has the command that installs it. A traceback is a bug
of ours.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Final, NamedTuple, NoReturn

import typer
import typer.exceptions

from cascadeinfer import __version__
from cascadeinfer.cli.completion import INSTRUCTION, SCHEMAS, stand_in, typed_words
from cascadeinfer.cli.extras import EXTRAS, installation
from cascadeinfer.core.errors import ConfigError, EngineError, EventLogError, PlanError, ProfileError, TraceError


class Command(NamedTuple):
    """One row of the command table."""

    module: str
    help_text: str
    function: str | None = None


COMMANDS: Final[dict[str, Command]] = {
    "serve": Command("cascadeinfer.cli.serve", "Serve a model on several vLLM instances (OpenAI API).", "serve"),
    "stop": Command("cascadeinfer.cli.stop", "End a fleet of engines that outlive their servers (serve --fleet)."),
    "roll": Command(
        "cascadeinfer.cli.roll", "Replace a running server's instances by others with new engine options, one by one."
    ),
    "cluster": Command("cascadeinfer.cli.cluster", "Start or end a Ray on this machine, to try serve --cluster ray."),
    "demo": Command("cascadeinfer.cli.demo", "Show it: two instances, real chat requests that move between them."),
    "profile": Command(
        "cascadeinfer.cli.profile", "Measure a model's step times on this machine; writes a cost profile.", "profile"
    ),
    "plan": Command("cascadeinfer.cli.plan", "Plan length stages for a workload."),
    "simulate": Command("cascadeinfer.cli.simulate", "Simulate a workload under several policies."),
    "sweep": Command(
        "cascadeinfer.cli.sweep", "Simulate policies over a range of rates; the highest rate within an SLO."
    ),
    "replay": Command(
        "cascadeinfer.cli.replay", "Read an event log: summary, a request's story, the same decisions again?"
    ),
    "doctor": Command("cascadeinfer.cli.doctor", "Examine this machine and two small instances; what to mend."),
    "top": Command("cascadeinfer.cli.top", "Watch a running server in a terminal."),
    "bench": Command("cascadeinfer.cli.bench", "Replay a trace on a live OpenAI server; compare such runs."),
    "model": Command("cascadeinfer.cli.model", "Prepare models that need no hub."),
}

OPERATOR_ERRORS: Final = (ConfigError, EventLogError, PlanError, ProfileError, TraceError)
EXIT_OPERATOR: Final = 2
EXIT_FAILURE: Final = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments (by default the process's own) name, and exit with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(words)
    except OPERATOR_ERRORS as error:
        complain(error)
        sys.exit(EXIT_OPERATOR)
    except EngineError as error:
        complain(error)
        sys.exit(EXIT_FAILURE)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _complain(f"the package {package} is missing ({installation(EXTRAS[package])})")
        sys.exit(EXIT_OPERATOR)


def _run(words: list[str]) -> None:
    """Run the chosen command through its own parser, or everything else through typer."""
    if os.environ.get(INSTRUCTION):
        _complete()
    chosen = _command_in(words)
    command = COMMANDS.get(chosen or "")
    if command is not None and command.function is not None and words[0] == chosen:
        getattr(importlib.import_module(command.module), command.function)(words[1:])
        return
    _run_typed(build_app(chosen), words)


def _run_typed(app: typer.Typer, words: list[str]) -> NoReturn:
    """Run the application; what its parser refuses ends in one line, like all other mistakes."""
    try:
        code = app(words, prog_name="cascadeinfer", standalone_mode=False)
    except typer.exceptions.TyperException as error:
        told = error.format_message()
        if "\n" in told or not told:  # the help, for a command that does nothing without a subcommand
            typer.echo(told, err=True)
        else:
            context = getattr(error, "ctx", None)
            path = "cascadeinfer" if context is None else context.command_path
            _complain(f"{told.rstrip('.')} ({path} --help lists the options)")
        sys.exit(error.exit_code)
    except typer.Abort:
        _complain("interrupted")
        sys.exit(EXIT_FAILURE)
    sys.exit(code if isinstance(code, int) else 0)


def _complete() -> NoReturn:
    """Answer the shell: the completions of what was typed, or the script that asks for them."""
    chosen = _command_in(typed_words(os.environ) or [])
    stand_ins = {name: stand_in(name) for name in SCHEMAS if name == chosen}
    build_app(chosen, stand_ins)([], prog_name="cascadeinfer")
    raise AssertionError("typer exits after a completion")


def _command_in(words: Sequence[str]) -> str | None:
    """The first word that is no option."""
    return next((word for word in words if not word.startswith("-")), None)


def build_app(chosen: str | None, stand_ins: Mapping[str, Callable[..., None]] = MappingProxyType({})) -> typer.Typer:
    """
    The application: the chosen command in full, the others with name and help only.

    Args:
        chosen: Name of the command, or whatever word stands in its place.
        stand_ins: Functions whose parameters are completed for commands with a parser of their own.
    """
    app = typer.Typer(
        help="Length-aware serving of one LLM on many instances, with live migration of running requests.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        if name == chosen and command.function is None:
            importlib.import_module(command.module).register(app, name, command.help_text)
        else:
            app.command(name, help=command.help_text)(stand_ins.get(name, _not_chosen))
    return app


def _root(
    *,
    version: Annotated[
        bool,
        # A callback, because the function itself runs only once a command is named.
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(show=v)
        ),
    ] = False,
) -> None:
    """Options before the command."""


def _version(*, show: bool) -> None:
    """Print the version and exit."""
    if show:
        typer.echo(f"cascadeinfer {__version__}")
        raise typer.Exit


def _not_chosen() -> None:
    """Placeholder for a command in the list; never runs, because another command was chosen."""
    raise AssertionError("the command that was named is loaded in full")


def _sentence(error: Exception) -> str:
    """The error with its notes, such as the file in which it occurred."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def complain(error: Exception) -> None:
    """Print an error to standard error, in one line."""
    _complain(_sentence(error))


def _complain(message: str) -> None:
    """Print one line to standard error."""
    sys.stderr.write(f"cascadeinfer: error: {' '.join(message.split())}\n")
