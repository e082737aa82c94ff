"""The command line's entry: the command table, lazy loading, and how errors are reported."""

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import cascadeinfer
from cascadeinfer.cli import main as entry
from cascadeinfer.core.errors import ConfigError, EngineError, InvalidTransition, PlanError, ProfileError, TraceError

ENTRY_MODULES = ("cascadeinfer.cli.main", "cascadeinfer.cli.completion", "cascadeinfer.cli.extras")
HEAVY_PACKAGES = ("vllm", "torch", "transformers", "numba", "numpy", "tokenizers", "uvicorn", "matplotlib")


def run(*arguments: str) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        entry.main(list(arguments))
    code = end.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def failing_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Adds the commands `fail` (typer's parser) and `fail-raw` (its own), which raise what they are given."""

    def install(error: Exception) -> None:
        def fail(_arguments: list[str] | None = None) -> None:
            raise error

        def typed() -> None:
            fail()

        def register(app: typer.Typer, name: str, help_text: str) -> None:
            app.command(name, help=help_text)(typed)

        module = SimpleNamespace(register=register, fail=fail)
        monkeypatch.setitem(sys.modules, "failing_module", module)
        monkeypatch.setitem(entry.COMMANDS, "fail", entry.Command("failing_module", "Fails."))
        monkeypatch.setitem(entry.COMMANDS, "fail-raw", entry.Command("failing_module", "Fails.", "fail"))

    return install


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["-h"]])
def test_start_imports_no_engine(words: list[str]) -> None:
    """Help and version load no command's module and no heavy package."""
    program = (
        "import sys, json\n"
        "from cascadeinfer.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    loaded = set(json.loads(result.stderr.splitlines()[-1]))
    assert not loaded & set(HEAVY_PACKAGES)
    assert not [name for name in loaded if name.startswith("cascadeinfer.cli.") and name not in ENTRY_MODULES]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "--foo"], "No such option: --foo (cascadeinfer simulate --help lists the options)"),
        (["plan", "--rate", "abc"], "Invalid value for '--rate': "),
        (["stop"], "Missing argument 'NAME' (cascadeinfer stop --help lists the options)"),
        (["cluster", "sideways"], "No such command 'sideways' (cascadeinfer cluster --help lists the options)"),
        (["sideways"], "No such command 'sideways' (cascadeinfer --help lists the options)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_parser_refuses_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    """Words that no command understands end as all other mistakes do: one line, exit code 2, no frame around it."""
    assert run(*words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cascadeinfer: error: {said}")


def test_a_command_that_needs_another_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """As before: the help, and the exit code of a mistake."""
    for words in ([], ["cluster"]):
        assert run(*words) == 2
        captured = capsys.readouterr()
        assert "Usage: cascadeinfer" in captured.out + captured.err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the package's version and succeeds without a command."""
    assert run("--version") == 0
    assert capsys.readouterr().out == f"cascadeinfer {cascadeinfer.__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The list of commands shows each row of the table with its help line."""
    assert run("--help") == 0
    listed = " ".join(capsys.readouterr().out.split())
    for name, command in entry.COMMANDS.items():
        assert name in listed
        assert command.help_text.split()[0] in listed


@pytest.mark.parametrize("name", list(entry.COMMANDS))
def test_table_names_what_exists(name: str) -> None:
    """Each row's module can be imported without an engine and has the function that its kind of row requires."""
    command = entry.COMMANDS[name]
    module = importlib.import_module(command.module)
    assert module.__doc__
    function = getattr(module, command.function or "register")
    parameters = list(inspect.signature(function).parameters)
    assert len(parameters) == (3 if command.function is None else 1), parameters


@pytest.mark.parametrize("name", [name for name, row in entry.COMMANDS.items() if row.function is None])
def test_typed_commands_have_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`cascadeinfer NAME --help` shows usage for each command that typer parses."""
    assert run(name, "--help") == 0
    assert f"cascadeinfer {name}" in capsys.readouterr().out


def test_raw_command_gets_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with its own parser gets all words after its name unchanged, help and unknown flags included."""
    received: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "raw_module", SimpleNamespace(take=received.append))
    monkeypatch.setitem(entry.COMMANDS, "raw", entry.Command("raw_module", "Takes all.", "take"))
    words = ["model", "--help", "--max-model-len=512", "-tp", "2", "--", "--version", "--stages", "0-512:1,512-:1"]
    entry.main(["raw", *words])
    assert received == [words]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("stages overlap", option="--stages", fix="write 0-512:1,512-:1"),
        PlanError("demand is above capacity"),
        ProfileError("unknown profile"),
        TraceError("not a number", line=3),
    ],
)
@pytest.mark.parametrize("command", ["fail", "fail-raw"])
def test_operator_error_is_one_line(
    error: Exception,
    command: str,
    failing_command: Callable[[Exception], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An operator's mistake ends in one line with the whole message, nothing on standard output, and exit code 2."""
    failing_command(error)
    assert run(command) == 2
    output = capsys.readouterr()
    assert output.err == f"cascadeinfer: error: {error}\n"
    assert output.out == ""


def test_message_of_several_lines_becomes_one(
    failing_command: Callable[[Exception], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Line breaks in a message (engines quote whole reports) become spaces."""
    failing_command(ConfigError("first\n  second"))
    assert run("fail") == 2
    assert capsys.readouterr().err == "cascadeinfer: error: first second\n"


def test_engine_failure_is_not_the_operators(
    failing_command: Callable[[Exception], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A failing engine also ends in one line, with exit code 1."""
    failing_command(EngineError("did not start", instance_id="i0"))
    assert run("fail") == 1
    assert capsys.readouterr().err == "cascadeinfer: error: instance i0: did not start\n"


def test_missing_extra_is_named(
    failing_command: Callable[[Exception], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """If the package of an extra is missing, the answer is the command that installs it."""
    failing_command(ModuleNotFoundError("No module named 'aiohttp.web'", name="aiohttp.web"))
    assert run("fail-raw") == 2
    assert "aiohttp is missing (pip install 'cascadeinfer[bench]')" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        InvalidTransition("migration", state="idle", event="Cut"),
        ModuleNotFoundError("No module named 'cascadeinfer.x'", name="cascadeinfer.x"),
        ZeroDivisionError(),
    ],
)
def test_our_bugs_keep_their_traceback(error: Exception, failing_command: Callable[[Exception], None]) -> None:
    """What is not the operator's fault is not reported as such."""
    failing_command(error)
    with pytest.raises(type(error)):
        entry.main(["fail"])


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["--nonsense"], ["model", "nonsense"], ["model", "prepare", "--no"]]
)
def test_wrong_usage_has_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No command, an unknown command and an unknown option end with usage and exit code 2."""
    assert run(*words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_model_tiny_prints_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`model tiny` writes a model folder and prints nothing but its path on standard output."""
    folder = tmp_path / "tiny"
    assert run("model", "tiny", str(folder), "--max-positions", "256") == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 256


def test_model_tiny_refuses_a_folder_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that leads through a file is refused with the argument's name."""
    (tmp_path / "file").write_text("")
    assert run("model", "tiny", str(tmp_path / "file" / "x")) == 2
    assert capsys.readouterr().err.startswith("cascadeinfer: error: FOLDER: cannot write")


def test_model_prepare_names_the_cache_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a cache that cannot be written, the message names the variable that moves it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CASCADEINFER_CACHE", str(tmp_path / "file"))
    assert run("model", "prepare") == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("cascadeinfer: error: CASCADEINFER_CACHE:")
