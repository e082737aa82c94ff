"""The commands that pages show, as a reader would copy them, and vLLM's parser for those that serve."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
PROGRAMS = (
    "cascadeinfer", "curl", "docker", "grep", "install", "kubectl", "make", "pip", "podman", "python", "python3.11",
    "systemctl", "useradd",
)  # fmt: skip
"""First words of lines that are commands in a block without a language; in a block of shell every line is one."""
SHELL = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Command:
    """
    One command of a page.

    Attributes:
        page: Path of the page from the checkout's root.
        text: The line without its comment.
        words: Its words without variables before it; the first is the program's name without its folder.
    """

    page: str
    text: str
    words: tuple[str, ...]


def commands_in(text: str, page: str = "") -> list[Command]:
    """The commands in the code blocks of a page, those below list items included."""
    found = []
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
        if language not in ("", *SHELL):
            continue
        for line in _whole_lines(block, shell=language in SHELL):
            bare = re.split(r"\s+#\s", line)[0].strip()
            program = re.match(r"(?:[A-Z_]+=\S+ )*([^\s#]\S*)", bare)
            if program and (language in SHELL or program[1].rpartition("/")[2] in PROGRAMS):
                found.append(Command(page, bare, _words(bare)))
    return found


def _whole_lines(block: str, *, shell: bool) -> Iterator[str]:
    """Lines with those that a backslash continues and, in a block of shell, those that an open quote continues."""
    held = ""
    for line in block.replace("\\\n", " ").splitlines():
        held += line
        if shell and held.count("'") % 2:
            held += "\n"
            continue
        yield held
        held = ""


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return (words[0].rpartition("/")[2], *words[1:])


def shown_commands() -> list[Command]:
    """The commands of all pages."""
    return [
        command
        for path in PAGES
        for command in commands_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


def parsed_by_serve(words: list[str]) -> None:
    """Parse the words after `serve` as it does; raises if it would refuse them. A model need not be named."""
    pytest.importorskip("vllm")
    from cascadeinfer.cli.serve import parse
    from cascadeinfer.config.schema import options_of

    named = words if words and not words[0].startswith("-") else ["org/model", *words]
    with pytest.MonkeyPatch.context() as patch:  # the logging of a server is not that of the tests
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setattr("cascadeinfer.frontend.logs.set_up_logs", lambda *_, **__: None)
        options_of(parse(named)).roles()
