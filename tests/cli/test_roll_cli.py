"""`cascadeinfer roll` and its routes: what the server is asked, what the operator is told, and the exit codes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from experiment_words import run
from fastapi import FastAPI

from cascadeinfer.cli import roll
from cascadeinfer.cli.admin_calls import KEY_VARIABLE
from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.frontend.door.door import Door
from cascadeinfer.frontend.door.keys import Keys
from cascadeinfer.frontend.rolling import roll_routes
from support.served_page import ADMIN_KEY, API_KEY, serving

DRAIN_TIMEOUT_S = 7.0


class Scripted:
    """See `cascadeinfer.frontend.rolling.Rolls`: shows one state after the other, and then the last."""

    def __init__(self) -> None:
        """Nothing has begun."""
        self.begun: list[tuple[list[str], float]] = []
        self.refusal: Exception | None = None
        self.lines = ["instance 2 starts", "instance 2 is up", "instance 0 is gone"]
        self.ends_as = "done"
        self.error: str | None = None
        self.is_ending = False
        self.n_shown = 0

    async def roll(self, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """Begin, or refuse."""
        if self.refusal is not None:
            raise self.refusal
        self.begun.append((list(options), timeout_s))
        return await self.rolled()

    async def rolled(self) -> dict[str, Any]:
        """One line more each time."""
        if not self.begun:
            return {"state": "none"}
        self.n_shown += 1
        lines = [{"seconds": 1.5 * n, "line": line} for n, line in enumerate(self.lines[: self.n_shown])]
        state = "rolling" if self.n_shown < len(self.lines) else self.ends_as
        return {"state": state, "options": ["--max-num-seqs 8"], "lines": lines, "error": self.error}

    def app(self) -> Door:
        """The door with the routes behind it."""
        inner = FastAPI()
        inner.include_router(roll_routes(self, DRAIN_TIMEOUT_S))
        return Door(inner, Keys([API_KEY], [ADMIN_KEY]), max_body_bytes=10_000)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """What is behind the routes; the command asks without a pause, with the right key."""
    monkeypatch.setattr(roll, "POLL_S", 0.0)
    monkeypatch.setenv(KEY_VARIABLE, ADMIN_KEY)
    return Scripted()


@pytest.fixture
def url(scripted: Scripted) -> Iterator[str]:
    """The server's address."""
    with serving(scripted) as address:
        yield address


def test_engine_options_go_to_the_server(scripted: Scripted, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, wherever ours stand; each line is told once, and at the end what to start the server with."""
    assert run("roll", "--max-num-seqs", "8", "--url", url, "--enforce-eager", "-tp=2") == 0
    assert scripted.begun == [(["--max-num-seqs", "8", "--enforce-eager", "-tp=2"], DRAIN_TIMEOUT_S)]
    out = capsys.readouterr().out
    assert [out.count(line) for line in scripted.lines] == [1, 1, 1]
    assert out.splitlines()[1] == "    1.5 s  instance 2 is up"
    assert out.splitlines()[-1] == "from now on, start this server with: --max-num-seqs 8"


def test_a_time_limit(scripted: Scripted, url: str) -> None:
    """It is ours, not the engines'."""
    assert run("roll", "--url", url, "--timeout-s", "3", "--block-size", "32") == 0
    assert scripted.begun == [(["--block-size", "32"], 3.0)]


def test_one_that_stopped(scripted: Scripted, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, with the server's lines."""
    scripted.ends_as = "failed"
    scripted.lines[-1] = "stopped: instance 2: did not start: no memory"
    assert run("roll", "--url", url, "--max-num-seqs", "8") == 1
    out = capsys.readouterr().out
    assert "no memory" in out
    assert "from now on" not in out


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (ConfigError("is read by the front end", option="--tokenizer"), "--tokenizer: is read by the front end"),
        (ScalingRefusedError("a rolling update is under way"), "a rolling update is under way"),
    ],
)
def test_a_refusal(
    scripted: Scripted, url: str, refusal: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2."""
    scripted.refusal = refusal
    assert run("roll", "--url", url, "--tokenizer", "x") == 2
    assert capsys.readouterr() == ("", f"cascadeinfer: error: {line}\n")


def test_watching(scripted: Scripted, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It follows what is under way, begins nothing, and takes no options."""
    assert run("roll", "--url", url, "--watch") == 2
    assert "has begun no update since its start" in capsys.readouterr().err
    scripted.begun.append(([], 0.0))
    assert run("roll", "--url", url, "--watch") == 0
    assert len(scripted.begun) == 1
    assert run("roll", "--url", url, "--watch", "--max-num-seqs", "8") == 2


def test_a_server_that_is_gone_in_the_middle(
    scripted: Scripted, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1: the options were right."""
    told = scripted.rolled

    async def shown() -> dict[str, Any]:
        if scripted.n_shown == 2:
            raise ConnectionResetError
        return await told()

    monkeypatch.setattr(scripted, "rolled", shown)
    assert run("roll", "--url", url, "--max-num-seqs", "8") == 1
    assert "the update was under way, and" in capsys.readouterr().err


@pytest.mark.usefixtures("scripted")
def test_ctrl_c_leaves_it_under_way(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the server's."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(roll.time, "sleep", interrupt)
    assert run("roll", "--url", url, "--max-num-seqs", "8") == 130
    assert "the update goes on; --watch follows it again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--url", "nonsense"), "--url: 'nonsense' is not an address (for example http://127.0.0.1:8000)"),
        (("--url", "http://127.0.0.1:1"), "http://127.0.0.1:1 cannot be reached: Connection refused"),
    ],
)
@pytest.mark.usefixtures("scripted")
def test_a_wrong_address(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert run("roll", *words, "--max-num-seqs", "8") == 2
    assert capsys.readouterr().err == f"cascadeinfer: error: {line}\n"


def test_keys(scripted: Scripted, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The admin key, and no other."""
    assert run("roll", "--url", url, "--admin-api-key", API_KEY, "--max-num-seqs", "8") == 2
    assert "not as its admin key" in capsys.readouterr().err
    assert run("roll", "--url", url, "--admin-api-key", "wrong", "--max-num-seqs", "8") == 2
    assert "does not know this key" in capsys.readouterr().err
    assert not scripted.begun
