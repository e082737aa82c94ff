"""Replay: the same policy does the same again, and a difference is found where it begins. Stories and sums of a log."""

from collections import Counter
from pathlib import Path

import pytest
from log_files import SPECS, lines_of, simulated_log, without_hashes, write_lines

from cascadeinfer.core.effects import Dispatch, PublishLayout, SendMessage, StartMigration
from cascadeinfer.core.errors import EventLogError
from cascadeinfer.core.events import MigrationEnded, RequestFinished
from cascadeinfer.eventlog.log_summary import summarise_log
from cascadeinfer.eventlog.reader import open_log
from cascadeinfer.eventlog.replay import CONTEXT_EVENTS, replay
from cascadeinfer.eventlog.story import find_request, story_of


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_policy_does_the_same_again(name: str, tmp_path: Path) -> None:
    """A simulated run with a crash, a drain and lost messages, replayed: the same effects for every event."""
    path = tmp_path / "log.gz"
    seen = simulated_log(path, SPECS[name])
    done = replay(open_log(path))
    assert done.difference is None
    assert (done.events, done.effects) == (len(seen), sum(len(effects) for _, effects in seen))
    kinds = {type(effect) for _, effects in seen for effect in effects}
    assert Dispatch in kinds
    if "cascade" in name:
        assert {SendMessage, StartMigration, PublishLayout} <= kinds


def test_the_log_has_what_happened(tmp_path: Path) -> None:
    """Events and effects read from the log are those of the run, prefix hashes apart."""
    path = tmp_path / "log"
    seen = simulated_log(path, SPECS["cascade"])
    read = [(without_hashes(entry.event), list(entry.effects)) for entry in open_log(path)]
    assert read == [(without_hashes(event), effects) for event, effects in seen]


def test_the_first_difference_is_found(tmp_path: Path) -> None:
    """A log whose 4th dispatch names another instance: the replay stops there, with both versions and what preceded."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["round_robin"])
    lines = lines_of(path)
    where = [i for i, line in enumerate(lines) if b'"Dispatch"' in line][3]
    place = b'"type":"Dispatch"'
    before, _, after = lines[where].partition(place)
    wrong = after.replace(b'"instance_id":"i0"', b'"instance_id":"i2"')
    assert wrong != after
    write_lines(path, [*lines[:where], before + place + wrong, *lines[where + 1 :]])
    difference = replay(open_log(path)).difference
    assert difference is not None
    assert difference.logged.place.line == where + 1
    assert [effect.instance_id for effect in difference.logged.effects] == ["i2"]
    assert [effect.instance_id for effect in difference.effects] == ["i0"]
    assert [e.n for e in difference.before] == list(range(difference.logged.n - CONTEXT_EVENTS, difference.logged.n))


def test_another_option_is_a_difference(tmp_path: Path) -> None:
    """A log that is replayed with another option than it was written with differs."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["static_stages"])
    lines = lines_of(path)
    changed = lines[0].replace(b"[0,60]", b"[0,80]").replace(b"[60,140]", b"[80,140]")
    write_lines(path, [changed, *lines[1:]])
    assert replay(open_log(path)).difference is not None


def test_a_gap_ends_the_comparison(tmp_path: Path) -> None:
    """Where events are missing, the replay reports how far it came, and that it cannot continue."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["round_robin"])
    lines = lines_of(path)
    where = next(i for i, line in enumerate(lines) if i >= 10 and b'"RequestArrived"' in line)
    write_lines(path, [*lines[:where], b'{"line":"dropped","count":1}\n', *lines[where + 1 :]])
    log = open_log(path)
    before = where - 1
    with pytest.raises(
        EventLogError, match=rf"line {where + 1}: 1 events are missing: the {before} events before replay the same"
    ):
        replay(log)
    assert summarise_log(log).missing == 1


def test_a_log_without_its_beginning_is_not_replayed(tmp_path: Path) -> None:
    """Once rotation has deleted the first part, a replay is refused with a hint on how to keep it."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["round_robin"])
    lines = lines_of(path)
    write_lines(path, [lines[0].replace(b'"part":1', b'"part":2'), *lines[5:]])
    with pytest.raises(EventLogError, match=r"begins with part 2.*--event-log-files"):
        replay(open_log(path))
    assert summarise_log(open_log(path)).events["RequestArrived"] > 0


@pytest.mark.parametrize("options", [b"{}", b'{"layout":null}', b'{"boundaries_tokens":[9,3]}'])
def test_a_policy_that_cannot_be_made_is_told(tmp_path: Path, options: bytes) -> None:
    """Options that are missing or contradict each other are errors of line 1, not tracebacks."""
    path = tmp_path / "log"
    name = "static_length" if b"boundaries" in options else "static_stages"
    simulated_log(path, SPECS["round_robin"], requests=5)
    lines = lines_of(path)
    head = lines[0].replace(b'"options":{}', b'"options":' + options).replace(b"round_robin", name.encode())
    write_lines(path, [head, *lines[1:]])
    with pytest.raises(EventLogError, match="line 1: policy"):
        replay(open_log(path))


def test_a_failure_is_replayed_as_a_failure(tmp_path: Path) -> None:
    """At an event at which the policy raised, it must raise again; if it does not, that is a difference."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["round_robin"])
    lines = lines_of(path)
    failed = lines[4].rstrip(b"}\n").partition(b',"effects"')[0].rstrip(b"}") + b'},"failed":"KeyError"}\n'
    write_lines(path, [*lines[:4], failed, *lines[5:]])
    log = open_log(path)
    difference = replay(log).difference
    assert difference is not None
    assert (difference.logged.failed, difference.failed) == ("KeyError", None)
    assert summarise_log(log).failed == 1


def test_sums_are_those_of_the_run(tmp_path: Path) -> None:
    """Counts of requests, dispatches, messages, migrations and layouts are those of the run."""
    path = tmp_path / "log"
    seen = simulated_log(path, SPECS["cascade"])
    summary = summarise_log(open_log(path))
    effects = [effect for _, made in seen for effect in made]
    assert (summary.arrived, summary.finished) == (120, 120)
    assert sum(summary.dispatches.values()) == sum(isinstance(e, Dispatch) for e in effects)
    assert len(summary.layouts) == sum(isinstance(e, PublishLayout) for e in effects)
    assert summary.messages == Counter(type(e.message).__name__ for e in effects if isinstance(e, SendMessage))
    started = Counter(e.reason.value for e in effects if isinstance(e, StartMigration))
    ended = Counter[str]()
    for (reason, _, _), count in summary.migrations.items():
        ended[reason] += count
    assert ended == started
    outcomes = Counter(e.outcome.value for e, _ in seen if isinstance(e, MigrationEnded))
    assert Counter(outcome for (_, outcome, _), n in summary.migrations.items() for _ in range(n)) == outcomes
    assert [what for _, what, _ in summary.memberships].count("joined") == 4
    assert summary.output_tokens == sum(e.output_tokens for e, _ in seen if isinstance(e, RequestFinished))


def test_a_story_has_every_part_of_a_life(tmp_path: Path) -> None:
    """A request that moved: arrived, dispatched, ran, was asked for, bid for, awarded, moved, ended, in this order."""
    path = tmp_path / "log"
    seen = simulated_log(path, SPECS["cascade"])
    moved = next(e.request_id for e, _ in seen if isinstance(e, MigrationEnded) and e.outcome == "moved")
    text = [chapter.text for chapter in story_of(open_log(path), moved)]
    wanted = [
        "arrived: ", "dispatched to ", "runs on ", " asks ", " bids: ", " awards ", " keeps a place", " begins at ",
        " is over: moved", "ended after ",
    ]  # fmt: skip
    found = [next(i for i, line in enumerate(text) if part in line) for part in wanted]
    assert found == sorted(found), text
    assert "(stage " in "".join(text)


def test_a_story_says_when_a_backlog_decided(tmp_path: Path) -> None:
    """Of two dispatches, only the one that the log marks as shared gives the reason."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["least_loaded"])
    placed, shared = '"type":"Dispatch","cause":"r0",', '"type":"Dispatch","shared":true,"cause":"r0",'
    text = path.read_text()
    assert text.count(placed) == 1
    path.write_text(text.replace(placed, shared))
    told = {r: [chapter.text for chapter in story_of(open_log(path), r)][1] for r in ("r0", "r1")}
    assert told["r0"].endswith(", because prompts queue in its stage")
    assert told["r1"].startswith("dispatched to ")
    assert "because" not in told["r1"]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_story_says_why_here(tmp_path: Path, name: str) -> None:
    """After each dispatch and each start of a move, the story says why there, and in a log the scores come back."""
    path = tmp_path / "log"
    seen = simulated_log(path, SPECS[name])
    chosen = [e for _, effects in seen for e in effects if isinstance(e, Dispatch | StartMigration)]
    log = open_log(path)
    logged = [e for entry in log for e in entry.effects if isinstance(e, Dispatch | StartMigration)]
    assert [e.choice for e in logged] == [e.choice for e in chosen]
    assert all(e.choice is not None for e in chosen)
    for request_id in {e.request_id for e in chosen[:40]}:
        texts = [chapter.text for chapter in story_of(log, request_id)]
        places = [
            e.instance_id if isinstance(e, Dispatch) else e.target_id for e in chosen if e.request_id == request_id
        ]
        decided = [n for n, text in enumerate(texts) if text.startswith("dispatched") or " begins at " in text]
        assert [texts[n + 1].split(":")[0] for n in decided] == [f"why {place}" for place in places]


def test_every_story_begins_and_ends(tmp_path: Path) -> None:
    """Each request's story begins with its arrival and ends with its end."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["cascade"])
    log = open_log(path)
    stories = {f"r{i}": [chapter.text for chapter in story_of(log, f"r{i}")] for i in range(0, 120, 7)}
    assert all(story[0].startswith("arrived") and story[-1].startswith("ended") for story in stories.values())


def test_requests_are_found_by_the_beginning_of_their_ids(tmp_path: Path) -> None:
    """An exact id wins over longer ones; a unique prefix is enough; none or several matches are reported."""
    path = tmp_path / "log"
    simulated_log(path, SPECS["least_loaded"])
    log = open_log(path)
    assert find_request(log, "r11") == "r11"
    assert find_request(log, "r119") == "r119"
    with pytest.raises(EventLogError, match=r"120 requests begin with 'r': .* \.\.\."):
        find_request(log, "r")
    with pytest.raises(EventLogError, match="no request 'x'"):
        find_request(log, "x")
