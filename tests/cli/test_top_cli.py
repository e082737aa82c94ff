"""`cascadeinfer top`: recorded pictures in 100 columns, what an operator sees of a wrong address or key, Ctrl-C."""

import contextlib
import io
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from experiment_words import run
from rich.console import Console

from cascadeinfer.cli.admin_calls import KEY_VARIABLE
from cascadeinfer.cli.top_view import cell_of, lasting, render
from support.pictures import MAX_TOKENS, TWO, record
from support.served_page import ADMIN_KEY, API_KEY, SERVED, Recorded, serving

WIDTH = 100
SERVICE = {"model": SERVED.model, "policy": SERVED.policy, "max_tokens": MAX_TOKENS, "version": SERVED.version}


@pytest.fixture(scope="module")
def pictures() -> list[dict[str, Any]]:
    """Two instances, a second apart."""
    return [{"service": SERVICE, **picture} for picture in record(TWO)]


@pytest.fixture
def url(pictures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that shows them."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with serving(Recorded(pictures)) as address:
        yield address


def shown(picture: dict[str, Any], before: dict[str, Any] | None = None, height: int | None = None) -> list[str]:
    """The lines of the view."""
    console = Console(width=WIDTH, file=io.StringIO(), record=True, force_terminal=False)
    console.print(render(picture, before, WIDTH, height))
    return console.export_text().splitlines()


def test_a_recorded_picture_in_100_columns(pictures: list[dict[str, Any]]) -> None:
    """Every line fits; head, lanes with their figures, plan and moves are there."""
    lines = shown(pictures[-1], pictures[-2])
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert f"{SERVED.model}  cascade" in lines[0]
    assert "2 of 2 instances up" in lines[1]
    assert "0.0 refused/s" in lines[1]
    low, high = (line for line in lines if re.match(r"[01] ", line))
    for line, instance in zip((low, high), pictures[-1]["instances"], strict=True):
        assert f" {instance['running']} " in line
        assert f"{instance['kv_usage']:.0%}" in line
        assert any(height in line for height in "▂▄▆█")
    assert low.index("·") < high.index("·")
    assert "stages in force for" in text
    assert "next plan in" in text
    assert re.search(r"\d+ moved \(outgrew stage\); pause p50 \d+ ms", text)


def test_trouble_is_shown_first(pictures: list[dict[str, Any]]) -> None:
    """In a low window lanes are left out, but not those of instances that are down or drain."""
    [one, _] = pictures[-1]["instances"]
    many = [{**one, "id": str(number)} for number in range(40)]
    many[30] |= {"up": False, "phase": "down", "last_error": "killed", "restart_in_s": 3.0}
    many[35] |= {"build": 2, "drain": {"time_left_s": 61.0, "requests_at_start": 9}, "phase": "draining"}
    lines = shown({**pictures[-1], "instances": many}, height=24)
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert "starts in 3 s, killed" in text
    assert re.search(r"draining .* build 2, \d+ of 9 left", text)
    assert re.search(r"and \d+ more instances", text)
    assert "39 of 40 instances up" in text


def test_refusals_are_a_rate(pictures: list[dict[str, Any]]) -> None:
    """Refusals since the picture before, by the server's clock; none is known with the first picture."""
    first, second = (
        {**p, "requests": {**p["requests"], "ended": {"rejected": n}}} for p, n in zip(pictures, (3, 8), strict=False)
    )
    seconds = second["now_s"] - first["now_s"]
    assert f"{5 / seconds:.1f} refused/s" in shown(second, first)[1]
    assert "- refused/s" in shown(second)[1]


def test_the_axis_is_logarithmic() -> None:
    """Each doubling takes as many cells; what is shorter or longer than the axis is at its ends."""
    cells = [cell_of(tokens, 100, 16 << 10) for tokens in (1, 16, 32, 64, 128, 16 << 10, 1 << 30)]
    assert cells == [0, 0, 10, 20, 30, 99, 99]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.0, "59 s"), (61.0, "1 min 1 s"), (7325.0, "2 h 2 min"), (90000.0, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    """The two largest units."""
    assert lasting(seconds) == text


def test_one_picture(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--once` prints one and ends; the key comes from the option or from the environment."""
    assert run("top", url, "--once", "--admin-api-key", ADMIN_KEY) == 0
    assert "2 of 2 instances up" in capsys.readouterr().out
    monkeypatch.setenv(KEY_VARIABLE, ADMIN_KEY)
    assert run("top", url + "/", "--once") == 0
    assert "2 of 2 instances up" in capsys.readouterr().out


def test_wrong_keys(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says whether a key is missing, unknown, or not the admin key."""
    for words, complaint in (
        ((), "asks for its admin key"),
        (("--admin-api-key", "wrong"), "does not know this key"),
        (("--admin-api-key", API_KEY), "not as its admin key"),
    ):
        assert run("top", url, *words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert complaint in line
        assert KEY_VARIABLE in line


def test_wrong_addresses(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what is wrong with an address: no address, nobody there, another server."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for address, complaint in (
            ("localhost:8000", "is not an address"),
            ("http://localhost:port", "is not an address"),
            (nobody, f"{nobody} cannot be reached: Connection refused"),
            (f"{url}/elsewhere", "has no /admin/events"),
        ):
            assert run("top", address, "--admin-api-key", ADMIN_KEY) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert complaint in line


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_it(url: str) -> None:
    """An interrupt while it watches, in a terminal, ends it with exit code 0, and nothing on standard error."""
    words = [sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "top", url]
    environment = {**os.environ, KEY_VARIABLE: ADMIN_KEY, "TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": "40"}
    ours, its = pty.openpty()
    with subprocess.Popen(words, env=environment, stdout=its, stderr=subprocess.PIPE) as watching:
        os.close(its)
        seen = b""
        while seen.count(b"instances up") < 2:
            seen += os.read(ours, 65536)
        watching.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # that is how the end of a terminal reads
            while part := os.read(ours, 65536):
                seen += part
        assert watching.stderr is not None
        errors = watching.stderr.read()
    os.close(ours)
    assert (watching.returncode, errors) == (0, b"")
    assert b"\x1b[?1049l" in seen  # the terminal shows again what it showed before


def test_a_server_that_drains(pictures: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """One line says why it ends."""
    draining = Recorded(pictures)
    draining.is_ending = True
    with serving(draining) as address:
        assert run("top", address, "--admin-api-key", ADMIN_KEY) == 2
    assert "drains" in capsys.readouterr().err
