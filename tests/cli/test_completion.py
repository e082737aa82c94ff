"""Completion in the shell: what the Tab key gets, through the variables that typer's scripts set."""

import pytest

from cascadeinfer.cli import main as entry
from cascadeinfer.cli.completion import INSTRUCTION, SCHEMAS, typed_words


def completed(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash offers when the Tab key is pressed after this text."""
    monkeypatch.setenv(INSTRUCTION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", text)
    monkeypatch.setenv("COMP_CWORD", str(len(text.split(" ")) - 1))
    with pytest.raises(SystemExit) as end:
        entry.main([])
    assert not end.value.code
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("cascadeinfer si", ["simulate"]),
        ("cascadeinfer bench c", ["compare"]),
        ("cascadeinfer plan --prof", ["--profile"]),
        ("cascadeinfer serve --api-s", ["--api-servers"]),
        ("cascadeinfer serve MODEL --policy round", ["round_robin"]),
        ("cascadeinfer profile --res", ["--resume"]),
    ],
)
def test_the_tab_key_completes(
    text: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands, subcommands, options and choices are completed, those of commands with vLLM's parser included."""
    assert completed(text, monkeypatch, capsys) == offered


def test_every_command_is_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After the program's name all commands are offered."""
    assert completed("cascadeinfer ", monkeypatch, capsys) == list(entry.COMMANDS)


def test_every_command_with_its_own_parser_is_completed() -> None:
    """A new one needs a row in the table of option schemas."""
    assert set(SCHEMAS) == {name for name, row in entry.COMMANDS.items() if row.function is not None}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`_CASCADEINFER_COMPLETE=source_SHELL cascadeinfer` prints the script that installs completion."""
    monkeypatch.setenv(INSTRUCTION, f"source_{shell}")
    with pytest.raises(SystemExit) as end:
        entry.main([])
    assert not end.value.code
    assert f"complete_{shell}" in capsys.readouterr().out


def test_words_come_from_the_shells_variable() -> None:
    """Bash has one variable, the other shells another; without an instruction nothing is completed."""
    assert typed_words({INSTRUCTION: "complete_bash", "COMP_WORDS": "cascadeinfer plan x"}) == ["plan", "x"]
    assert typed_words({INSTRUCTION: "complete_zsh", "_TYPER_COMPLETE_ARGS": "cascadeinfer plan"}) == ["plan"]
    assert typed_words({INSTRUCTION: "source_bash", "COMP_WORDS": "cascadeinfer plan"}) is None
    assert typed_words({}) is None
