"""The demo: what it shows and says about made-up runs, how it treats its server, and one run on real engines."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cascadeinfer.cli import demo
from cascadeinfer.cli import main as entry
from cascadeinfer.cli.serve import parse
from cascadeinfer.cluster.ray_here import Head
from cascadeinfer.config.schema import options_of
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.demo import server as demo_server
from cascadeinfer.demo.requests import TASKS, ChatState, ChatTask, make_states, take_placements
from cascadeinfer.demo.server import DemoServer, server_command
from cascadeinfer.demo.view import Board, Summary, TextCheck, length_bar, render_board, render_summary, summarise
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.loadgen.served_process import ServerFailedError

TASK = ChatTask("story", "Tell me a story.", 100)


def shown(renderable: RenderableType, width: int = 140) -> str:
    """What a terminal of this width would show, without colours."""
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123 - lives with it
    console.print(renderable)
    return console.export_text()


def snapshot_of(*requests: tuple[str, str | None, int, int], moved: int = 0) -> dict[str, Any]:
    """`/admin/instances` of two instances in two stages with these requests (id, instance, tokens, attempts)."""
    instance: dict[str, Any] = {"up": True, "requests": 1, "kv_usage": 0.5, "kv_pulls": 0}
    instance |= {"pulled_tokens": 0, "precopied_tokens": 0}
    return {
        "stages": [{"range": "0-96", "instances": ["0"]}, {"range": "96-", "instances": ["1"]}],
        "instances": [
            {**instance, "id": "0", "stage": 0},
            {
                **instance,
                "id": "1",
                "stage": 1,
                "kv_pulls": moved,
                "pulled_tokens": moved,
                "precopied_tokens": 96 * moved,
            },
        ],
        "requests": {
            "live": len(requests),
            "unplaced": 0,
            "oldest": [
                {"id": i, "instance": at, "tokens": tokens, "attempts": attempts, "pinned": None}
                for i, at, tokens, attempts in requests
            ],
        },
        "migrations": {"under_way": 0, "ended": {"moved": moved} if moved else {}},
    }


def a_state(number: int = 1, **fields: Any) -> ChatState:
    """A finished request: 50 prompt and 100 answer tokens, the first at 0.5 s and one every 0.1 s from then on."""
    state = ChatState(number, TASK, f"run-{number}.", sent_s=10.0, ended_s=20.4, prompt_tokens=50, text="Once upon")
    state.chunks = [(10.5 + 0.1 * i, i + 1) for i in range(100)]
    state.finish_reason = "stop"
    for name, value in fields.items():
        setattr(state, name, value)
    return state


def a_summary(*states: ChatState, moved: int = 1, check: TextCheck | None = None) -> Summary:
    """The summary of these requests."""
    return summarise(states, snapshot_of(moved=moved), (0.3, moved), model="m", start_s=30.0, check=check)


def test_request_times_are_those_of_its_chunks() -> None:
    """First token, mean gap and longest gap follow from the chunks' times; a chunk counts all its tokens."""
    state = ChatState(1, TASK, "r", sent_s=1.0)
    assert (state.ttft_s, state.mean_itl_s, state.longest_gap_s, state.output_tokens) == (None, None, None, 0)
    state.chunks = [(1.5, 1), (1.75, 2), (2.75, 6)]
    assert state.ttft_s == pytest.approx(0.5)
    assert state.mean_itl_s == pytest.approx(1.25 / 5)
    assert state.longest_gap_s == pytest.approx(1.0)
    assert state.output_tokens == 6


def test_request_ids_are_not_prefixes_of_each_other() -> None:
    """No request's id occurs in another's, so a search among the server's ids finds one request only."""
    ids = [state.request_id for state in make_states(32, "run")]
    assert not [(a, b) for a in ids for b in ids if a != b and a in b]


def test_tasks_start_over_when_there_are_not_enough() -> None:
    """When there are more requests than tasks, tasks repeat under new numbers."""
    states = make_states(len(TASKS) + 1, "run")
    assert states[-1].task is TASKS[0]
    assert [state.number for state in states] == list(range(1, len(TASKS) + 2))


def test_placements_are_matched_by_id() -> None:
    """A request is found within the id that the server generated; a move is reported once, with its length."""
    states = [a_state(1), a_state(11)]
    ids = ["chatcmpl-run-1.-af03", "chatcmpl-run-11.-9c1e"]
    assert take_placements(snapshot_of((ids[1], "0", 60, 1)), states) == [
        "request 11 (story) runs in stage 0 (instance 0)"
    ]
    assert [state.instance_id for state in states] == [None, "0"]
    moved = snapshot_of((ids[0], None, 50, 0), (ids[1], "1", 97, 2))
    assert take_placements(moved, states) == ["request 11 (story) moved to stage 1 (instance 1) at 97 tokens"]
    assert take_placements(moved, states) == []
    assert [state.moves for state in states] == [0, 1]
    assert states[1].places == [("0", 60), ("1", 97)]


def test_bar_shows_prompt_stages_and_boundary() -> None:
    """The bar's cells are dim for the prompt and coloured by stage for the answer; the empty rest has the boundary."""
    state = a_state(places=[("0", 50), ("1", 100)])
    board = Board([state], 200, snapshot_of())
    bar = length_bar(state, board, 280)  # 10 tokens per cell
    styles = [span.style for span in bar.spans]
    assert styles == ["bright_black"] * 5 + ["green"] * 5 + ["magenta"] * 5 + ["dim"] * 13
    assert bar.plain == "█" * 15 + "·" * 5 + "│" + "·" * 7


@pytest.mark.parametrize("width", [60, 80, 140])
def test_board_shows_every_request(width: int) -> None:
    """Each request has a line with its state, each instance has its own, and no line is wider than the terminal."""
    states = [
        a_state(1),
        a_state(2, ended_s=None, places=[("0", 50), ("1", 97)], attempts=2),
        a_state(3, error="no more room"),
        ChatState(4, TASK, "run-4."),
    ]
    board = Board(states, 96, snapshot_of(moved=3), [(1.0, "request 2 (story) moved")])
    text = shown(render_board(board, 12.0), width)
    assert all(len(line) <= width for line in text.splitlines())
    if width == 140:
        for word in (
            "done (stop)",
            "stage 1, instance 1",
            "failed",
            "not sent yet",
            "3 moved",
            "Once upon",
            "12 s",
            "50%",
        ):
            assert word in text


def test_board_before_the_first_snapshot() -> None:
    """As long as nothing is known of the server, nothing is shown, and no error."""
    assert "none yet" in shown(render_board(Board(make_states(2, "run"), 96), 0.0))


def test_summary_adds_up() -> None:
    """The summary's tokens, times and pauses are those of the requests and of the server."""
    summary = a_summary(a_state(1), a_state(2, attempts=2, ended_s=30.0), moved=2)
    assert summary.output_tokens == 200
    assert summary.wall_s == pytest.approx(20.0)
    assert summary.moved_itl_s == pytest.approx(0.1)
    assert summary.mean_pause_s == pytest.approx(0.15)
    assert (summary.kv_pulls, summary.pulled_tokens) == (2, 194)
    text = shown(render_summary(summary))
    assert "200 tokens in 20.0 s: 10.0 tokens/s" in text
    assert "150 ms on average, 1.5 x" in text
    assert json.loads(json.dumps(summary.to_json()))["requests"][1]["moves"] == 1


def check_of(*, same: bool = True, stayed: bool = True) -> TextCheck:
    """A comparison with this outcome."""
    return TextCheck(2, same, stayed, "text", "text" if same else "other")


@pytest.mark.parametrize(
    ("states", "moved", "check", "complaint"),
    [
        ([a_state(1, error="gone")], 1, check_of(), "request 1 (story) failed: gone"),
        ([a_state(1, chunks=[])], 1, check_of(), "request 1 (story) gave no token"),
        ([a_state(1)], 0, None, "no request was handed over"),
        ([a_state(1)], 1, check_of(same=False), "request 2 answered otherwise"),
        ([a_state(1)], 1, check_of(stayed=False), "did not stay"),
    ],
)
def test_what_was_not_shown_is_a_failure(
    states: list[ChatState], moved: int, check: TextCheck | None, complaint: str
) -> None:
    """A failed request, an empty one, no hand-over, a different text: each is named, and nothing else is."""
    failures = a_summary(*states, moved=moved, check=check).failures()
    assert len(failures) == 1
    assert complaint in failures[0]


def test_a_good_run_has_no_failures() -> None:
    """Successful requests, a hand-over and equal texts make a success."""
    assert a_summary(a_state(1), a_state(2, attempts=2), check=check_of()).failures() == []


def test_pause_is_read_from_the_metrics() -> None:
    """Sum and count cover moved requests, not recomputed ones; without any, both are zero."""
    name = "cascadeinfer_migration_pause_seconds"
    lines = [f"# TYPE {name} histogram"]
    for outcome, total, count in (("moved", 0.75, 3), ("recomputed", 9.0, 1)):
        lines += [
            f'{name}_bucket{{le="+Inf",outcome="{outcome}"}} {count}',
            f'{name}_count{{outcome="{outcome}"}} {count}',
            f'{name}_sum{{outcome="{outcome}"}} {total}',
        ]
    assert demo.pause_of("\n".join(lines) + "\n") == (0.75, 3)
    assert demo.pause_of("") == (0.0, 0)


def test_server_command_is_one_that_serve_takes(tmp_path: Path) -> None:
    """The command line of the demo's server is valid: two instances, two stages that meet at the boundary."""
    pytest.importorskip("vllm")
    folder = make_tiny_llama(tmp_path / "tiny")
    command = server_command(str(folder), "tiny", 1234, on_cpu=True)
    args = parse(command[command.index("serve") + 1 :])
    options = options_of(args)
    boundary = demo_server.STAGE_BOUNDARY_TOKENS
    assert [str(stage.range) for stage in options.layout().stages] == [f"0-{boundary}", f"{boundary}-"]
    assert (args.port, args.served_model_name, args.dtype) == (1234, ["tiny"], "float32")


def test_server_command_on_a_cluster() -> None:
    """The engines are a fleet of their own on the Ray cluster."""
    command = server_command("org/model", "m", 1234, on_cpu=True, fleet="demo-1")
    assert command[-4:] == ["--cluster", "ray", "--fleet", "demo-1"]


@pytest.mark.parametrize("runs", [False, True], ids=["starts one", "uses one"])
def test_nothing_is_left_on_the_cluster(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    """A Ray started for the demo is ended, one that runs is freed of the engines only; after a failure, too."""
    done: list[str] = []
    head = Head("127.0.0.1:1", 1, 0.0)
    monkeypatch.setattr(demo.ray_here, "head", lambda: head if runs else None)
    monkeypatch.setattr(demo.ray_here, "up", lambda *_: done.append("up"))
    monkeypatch.setattr(demo.ray_here, "down", lambda: done.append("down"))
    monkeypatch.setattr(demo, "stop_on_ray", lambda fleet: done.append(f"stop {fleet}"))

    def fails() -> None:
        with demo._ray_for("demo-1", Console(file=io.StringIO())):
            done.append("serve")
            raise ServerFailedError("no", log=Path("log"), log_tail="")

    with pytest.raises(ServerFailedError):
        fails()
    assert done == (["serve", "stop demo-1"] if runs else ["up", "serve", "down"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DemoServer]:
    """A server that is not started; its log is removed and its process ended afterwards."""
    monkeypatch.setattr(demo_server, "STOP_TIMEOUT_S", 0.5)
    made = DemoServer("model", "model")
    yield made
    made.stop()
    made.log.unlink(missing_ok=True)


def test_a_server_that_does_not_start_is_reported(server: DemoServer) -> None:
    """When the process ends, waiting ends at once with its exit code, and the log's last lines hold what it said."""
    server.command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    server.start()
    with pytest.raises(ServerFailedError, match="exit code 3"):
        asyncio.run(server.becomes_ready(lambda _: None))
    assert server.log_tail() == "no such model"


def test_a_server_that_does_not_listen_to_sigterm_is_killed(server: DemoServer) -> None:
    """After the time-out, the process is killed together with all that it started."""
    child = "import time; time.sleep(600)"
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    server.command = [sys.executable, "-c", program]
    server.start()
    while not server.log_tail():
        server.check_alive()
        time.sleep(0.01)
    assert server.stop() == -signal.SIGKILL
    assert_ends(int(server.log_tail()))


def assert_ends(pid: int) -> None:
    """Wait until the process has ended, or is a zombie that nobody has reaped yet; pytest's time-out is the limit."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.01)


def test_stopping_what_never_started_is_harmless(server: DemoServer) -> None:
    """It is safe to call `stop` at any time."""
    assert server.stop() is None


def test_ready_and_pages_of_a_server(server: DemoServer) -> None:
    """Readiness is status 200 from /health/ready; another page with another status raises an error that names it."""
    program = (
        "import http.server, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        known = self.path in ('/health/ready', '/admin/instances')\n"
        "        self.send_response(200 if known else 404)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(b'{\"stages\": []}')\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    server.command = [sys.executable, "-c", program, str(server.port)]
    server.start()
    asyncio.run(server.becomes_ready(lambda _: None))
    assert asyncio.run(server.snapshot()) == {"stages": []}
    with pytest.raises(ServerFailedError, match="/metrics with 404"):
        asyncio.run(server.text("/metrics"))
    assert server.stop() == -signal.SIGTERM


@pytest.mark.parametrize("words", [["--model", "/no/such/folder"], ["--json", "/no/such/folder/out.json"]])
def test_bad_options_end_before_anything_starts(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing folder ends in one line with the option's name and exit code 2; no server is started."""
    monkeypatch.setattr(demo, "DemoServer", lambda *_: pytest.fail("a server was made"))
    with pytest.raises(SystemExit) as end:
        entry.main(["demo", *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"cascadeinfer: error: {words[0]}:")


def test_a_repository_is_left_to_the_server() -> None:
    """A name that is no path is passed on unchanged."""
    assert demo._model_of("org/model", Console()) == ("org/model", "org/model")


def test_a_log_says_that_the_model_is_being_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Preparing the embedded model takes a while the first time; a pipe has no spinner, so it gets a line before."""
    text = io.StringIO()

    def prepare() -> Path:
        assert text.getvalue().startswith("preparing the embedded model")
        return tmp_path

    monkeypatch.setattr("cascadeinfer.engines.models.embedded.prepare", prepare)
    assert demo._model_of(None, Console(file=text))[0] == str(tmp_path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    """A file is refused where a folder is needed."""
    (tmp_path / "weights.gguf").write_text("")
    with pytest.raises(ConfigError, match="not a model folder"):
        demo._model_of(str(tmp_path / "weights.gguf"), Console())


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_demo_on_real_engines(tmp_path: Path) -> None:
    """On the tiny model the demo hands a request over, compares its text, stops its server and exits with 0."""
    folder = make_tiny_llama(tmp_path / "tiny")
    result_file = tmp_path / "result.json"
    command = "from cascadeinfer.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", command, "demo", "--model", str(folder), "--requests", "4", "--json", str(result_file)],
        capture_output=True,
        text=True,
        check=False,
        # The path of vLLM's sockets must stay short.
        env=os.environ | {"TMPDIR": str(tmp_path), "VLLM_RPC_BASE_PATH": tempfile.gettempdir()},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result_file.read_text())
    assert summary["failures"] == []
    assert summary["migrations"]["moved"] >= 1
    assert summary["kv_pulls"] >= summary["migrations"]["moved"]
    assert [request["output_tokens"] for request in summary["requests"]] == [task.max_tokens for task in TASKS[:4]]
    assert not list(tmp_path.glob("cascadeinfer-demo-*.log")), "the log of a good run is removed"
    assert not [line for line in processes() if str(folder) in line], "the server has been left running"


def processes() -> list[str]:
    """Command lines of all processes except this one."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if path.parent.name != str(os.getpid()):
            lines.append(line)
    return lines


def test_the_start_says_what_takes_long(tmp_path: Path) -> None:
    """The last of the server's own lines about its start stands beside the seconds."""
    server = demo.DemoServer("org/model", "m")
    server.log.unlink()
    server.log = tmp_path / "log"
    server.log.write_text("")
    assert demo._start_line(server, 3.2) == "starting two instances: 3 s"
    server.log.write_text(
        "(MainProcess pid=1) INFO 11-29 23:15:14 [assemble.py:195] compiling the planner\n"
        "(MainProcess pid=1) INFO 11-29 23:15:15 [start_report.py:95] instance 0: loading the model (1 s)\n"
        "(instance 0 EngineCore pid=2) ERROR 11-29 23:15:15 [core.py:95] something else\n"
    )
    assert demo._start_line(server, 4.0) == "starting two instances: 4 s; instance 0: loading the model (1 s)"
