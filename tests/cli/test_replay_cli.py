"""`cascadeinfer replay` on the log of a simulation: summary, story, check, and bad input."""

import gzip
from pathlib import Path

import pytest
from experiment_words import mixed_trace, run, words_for


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The event log of a simulated cascade."""
    folder = tmp_path_factory.mktemp("log")
    path = folder / "log.jsonl.gz"
    words = words_for("simulate", mixed_trace(folder), policy="cascade", seeds="1", requests="150", event_log=str(path))
    assert run(*words) == 0
    return path


def test_summary_names_what_happened(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary has policy, counts of events, requests, migrations by reason and outcome, and the layouts."""
    assert run("replay", str(log)) == 0
    text = capsys.readouterr().out
    for part in (
        "cascade on 8 instances (simulator)",
        "150 arrived, 150 ended",
        "outgrew_stage    moved",
        "layouts: ",
        "i7 joined",
    ):
        assert part in text, text


def test_check_finds_the_same(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log of a simulation replays to the same effects."""
    assert run("replay", str(log), "--check") == 0
    assert "the replay does the same" in capsys.readouterr().out


def test_check_shows_the_first_difference(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log that differs ends in exit code 1, with the event, both versions of its effects, and what came before."""
    lines = gzip.decompress(log.read_bytes()).splitlines(keepends=True)
    where = [i for i, line in enumerate(lines) if b'"Dispatch"' in line][5]
    head, kind, tail = lines[where].partition(b'"type":"Dispatch"')
    other = tail.replace(b'"instance_id":"i', b'"instance_id":"j')
    changed = tmp_path / "changed"
    changed.write_bytes(b"".join([*lines[:where], head + kind + other, *lines[where + 1 :]]))
    assert run("replay", str(changed), "--check") == 1
    text = capsys.readouterr().out
    assert f"{changed}, line {where + 1}" in text.replace("\n", "")
    assert "the replay does something else" in text
    assert text.count("before:") == 5
    assert "instance_id='j" in text.partition("log:")[2]
    assert "instance_id='i" in text.partition("replay:")[2]


def test_story_is_told(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--request` tells one request's story from its arrival to its end."""
    assert run("replay", str(log), "--request", "r20") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r20"
    assert "+0.000 s  arrived: " in lines[1]
    assert "dispatched to i" in lines[2]
    assert "ended after " in lines[-1]


def test_a_log_that_breaks_off_is_noted(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log cut short by a crash is checked as far as it goes, with a note on standard error."""
    cut = tmp_path / "cut"
    cut.write_bytes(gzip.decompress(log.read_bytes())[:-100])
    assert run("replay", str(cut), "--check") == 0
    assert "breaks off here" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--check",), ("--request", "r1")])
def test_garbage_is_one_line_and_exit_code_2(
    tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is no event log is refused with file and line, whatever the option."""
    garbage = tmp_path / "garbage"
    garbage.write_text("hello\n")
    assert run("replay", str(garbage), *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{garbage}, line 1: not an event log" in error


def test_an_unknown_request_is_refused(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request that is not in the log is an error."""
    assert run("replay", str(log), "--request", "chatcmpl-1") == 2
    assert "no request 'chatcmpl-1'" in capsys.readouterr().err


def test_several_runs_have_several_logs(tmp_path: Path) -> None:
    """With several policies or seeds each run has its own log, named after both."""
    words = words_for(
        "simulate", mixed_trace(tmp_path), policy="round_robin,least_loaded", seeds="2", requests="30",
        event_log=str(tmp_path / "log.jsonl"),
    )  # fmt: skip
    assert run(*words) == 0
    names = sorted(path.name for path in tmp_path.glob("log*"))
    assert names == [f"log-{policy}-{seed}.jsonl" for policy in ("least_loaded", "round_robin") for seed in (0, 1)]
    assert all(run("replay", str(tmp_path / name), "--check") == 0 for name in names)
