"""`cascadeinfer bench`: a run against a server on the loopback, its files, comparisons of record files, bad input."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from experiment_words import run

from cascadeinfer.results.record_files import read_records, write_records
from cascadeinfer.results.records import RequestRecords

PNG = b"\x89PNG"
LOADGEN = Path(__file__).parent.parent / "loadgen"
sys.path.insert(0, str(LOADGEN))
sys.path.insert(0, str(LOADGEN.parent / "results"))

from fake_openai import Behaviour, FakeServer, running  # noqa: E402 - beside the load generator's tests
from record_rows import live_records  # noqa: E402 - beside the records' tests

COMMAND = (sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "bench")
HEADER = {"label": "one", "slo": {"ttft_s": 0.5, "tpot_s": 0.1}}


def trace_file(folder: Path, *, timed: bool = True) -> Path:
    """Twelve requests within a few milliseconds, one of them long."""
    path = folder / "trace.csv"
    rows = [f"{0.001 * i if timed else ''},{400 if i == 11 else 10},{3 + i % 2}" for i in range(12)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


async def bench(server: FakeServer, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a separate process, since the server runs in this one."""
    async with running(server):
        command = [*COMMAND, "--url", server.url]
        process = await asyncio.create_subprocess_exec(
            *command, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "200"}
        )
        out, error = await process.communicate()
    return subprocess.CompletedProcess(command, process.returncode or 0, out.decode(), error.decode())


async def test_a_run_leaves_records_figures_and_plots(tmp_path: Path) -> None:
    """
    The records match the trace; there are a summary by group and three figures; failures are on standard error and in
    the table.
    """
    server = FakeServer(lambda number: Behaviour(status=429) if number == 5 else Behaviour())
    files = {name: tmp_path / name for name in ("a.parquet", "a.json")}
    done = await bench(
        server, "--trace", str(trace_file(tmp_path)), "--warm-up", "0", "--label", "fake", "--long-tokens", "100",
        "--out", str(files["a.parquet"]), "--json", str(files["a.json"]), "--plot", str(tmp_path / "a"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 12 requests failed, e.g. HTTP 429" in done.stderr
    assert "fake" in done.stdout
    read = read_records(files["a.parquet"])
    assert read.label == "fake"
    assert int(read.records.finished.sum()) == 11
    assert read.records.prompt_tokens[-1] == 400
    content = json.loads(files["a.json"].read_text())
    assert content["labels"]["fake"]["errors"] == {"HTTP 429": 1}
    groups = content["labels"]["fake"]["runs"][0]
    assert {name: group["requests"] for name, group in groups.items()} == {"all": 12, "short": 11, "long": 1}
    assert all((tmp_path / f"a-{group}.png").read_bytes().startswith(PNG) for group in ("all", "short", "long"))


async def test_nothing_but_failures_is_a_failure(tmp_path: Path) -> None:
    """When no request succeeds the exit code is 1, and the figures are dashes, not an error."""
    done = await bench(FakeServer(lambda _: Behaviour(status=500)), "--trace", str(trace_file(tmp_path)))
    assert done.returncode == 1
    assert "12 of 12 requests failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("interruptible")
async def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    """
    After Ctrl-C with one answer still open, the exit code is 130, and the records hold every request sent, the open one
    as interrupted.
    """
    gate = asyncio.Event()
    server = FakeServer(lambda number: Behaviour(wait_for=gate) if number == 11 else Behaviour())
    out = tmp_path / "a.parquet"
    async with running(server):
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--url", server.url, "--trace", str(trace_file(tmp_path)), "--out", str(out),
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        async with server.arrived:
            await server.arrived.wait_for(lambda: server.answered == 11 and len(server.asked) == 12)
        process.send_signal(signal.SIGINT)
        _, error = await process.communicate()
        gate.set()
    assert process.returncode == 130, error
    read = read_records(out)
    interrupted = [text.startswith("interrupted") for text in read.errors]
    assert len(interrupted) == 12
    assert any(interrupted)
    assert read.records.finished.tolist() == [not cut for cut in interrupted]


async def test_arrivals_can_be_drawn(tmp_path: Path) -> None:
    """A trace without times needs an arrival process and a rate, and yields as many requests as requested."""
    words = ("--trace", str(trace_file(tmp_path, timed=False)))
    refused = await bench(FakeServer(), *words)
    assert refused.returncode == 2
    assert "--arrivals" in refused.stderr
    out = tmp_path / "a.parquet"
    server = FakeServer()
    done = await bench(server, *words, "--arrivals", "poisson", "--rate", "500", "--requests", "20", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert len(read_records(out).records) == len(server.asked) == 20


def synthetic(scale: float, seed: int) -> RequestRecords:
    """A run whose latencies are `scale` times those of the run with scale 1 and the same seed."""
    rng = np.random.default_rng(seed)
    n = 200
    e2e_s = scale * rng.gamma(4.0, 0.5, n)
    return live_records(
        np.cumsum(rng.exponential(0.1, n)), 0.1 * e2e_s, e2e_s, np.where(rng.random(n) < 0.2, 2000, 50), [20] * n
    )


def write(folder: Path, name: str, label: str, scale: float, seed: int) -> str:
    """A record file."""
    file = folder / name
    write_records(file, synthetic(scale, seed), [""] * 200, {**HEADER, "label": label})
    return str(file)


def test_compare_finds_the_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label twice as slow in each of three runs shows ratio 2.00 with no spread, and each group gets a plot."""
    files = [
        write(tmp_path, f"{label}{seed}.parquet", label, scale, seed)
        for label, scale in (("one", 1.0), ("two", 2.0))
        for seed in (0, 1, 2)
    ]
    out = tmp_path / "c.json"
    assert (
        run(
            "bench",
            "compare",
            *files,
            "--warm-up",
            "0",
            "--long-tokens",
            "1000",
            "--json",
            str(out),
            "--plot",
            str(tmp_path / "c"),
        )
        == 0
    )
    text = capsys.readouterr().out
    ratios = text[text.index("times one") :]
    assert "2.00 ±0.00" in ratios
    content = json.loads(out.read_text())
    assert [len(content["labels"][label]["runs"]) for label in ("one", "two")] == [3, 3]
    for group in ("all", "short", "long"):
        one, two = (
            content["labels"][label]["runs"][0][group]["figures"]["e2e_s_p99"]["value"] for label in ("one", "two")
        )
        assert two == pytest.approx(2 * one)
        assert (tmp_path / f"c-{group}.png").read_bytes().startswith(PNG)


def test_compare_says_when_it_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With two runs of each label there is a ratio and no interval, and a note says so; with three there is none."""
    labels = (("one", 1.0), ("two", 2.0))
    files = [write(tmp_path, f"{name}{seed}.parquet", name, scale, seed) for seed in (0, 1) for name, scale in labels]
    assert run("bench", "compare", *files, "--warm-up", "0") == 0
    said = capsys.readouterr()
    assert "cannot be told which label is better" in said.err
    assert "2.00 ±" not in said.out[said.out.index("times one") :]
    files += [write(tmp_path, f"{name}2.parquet", name, scale, 2) for name, scale in labels]
    assert run("bench", "compare", *files, "--warm-up", "0") == 0
    assert "cannot be told" not in capsys.readouterr().err


def test_figures_of_one_run_have_their_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single run's figures come with half the width of their 95 % interval, the one in the JSON file."""
    out = tmp_path / "c.json"
    assert (
        run("bench", "compare", write(tmp_path, "a.parquet", "one", 1.0, 0), "--warm-up", "0", "--json", str(out)) == 0
    )
    figure = json.loads(out.read_text())["labels"]["one"]["runs"][0]["all"]["figures"]["e2e_s_mean"]
    assert figure["low"] < figure["value"] < figure["high"]
    text = capsys.readouterr().out
    assert f"{figure['value']:.2f} ±{(figure['high'] - figure['low']) / 2:.2f}" in text
    assert "± half of the 95 % interval" in text


def test_records_survive_their_file(tmp_path: Path) -> None:
    """Records, errors and header survive a file."""
    records = synthetic(1.0, 0)
    file = tmp_path / "a.parquet"
    write_records(file, records, ["x: y"] + [""] * 199, HEADER)
    read = read_records(file)
    np.testing.assert_array_equal(read.records.e2e_s, records.e2e_s)
    assert read.errors[:2] == ("x: y", "")
    assert read.header == HEADER


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--trace", "t.csv"], "--url"),
        (["--url", "http://127.0.0.1:9"], "--trace"),
        (["--url", "http://127.0.0.1:9", "--trace", "missing.csv"], "missing.csv"),
        (["--url", "http://127.0.0.1:9", "--trace", "TRACE"], "--url: no server answers"),
        (["--url", "x", "--trace", "TRACE", "--api", "grpc"], "--api"),
        (["--url", "x", "--trace", "TRACE", "--rate", "0"], "--rate"),
        (["--url", "x", "--trace", "TRACE", "--timeout-s", "-1"], "--timeout-s"),
        (["--url", "x", "--trace", "TRACE", "--long-tokens", "0"], "--long-tokens"),
        (["--url", "x", "--trace", "TRACE", "--max-context", "1"], "--max-context"),
        (["--url", "x", "--trace", "TRACE", "--out", "/nowhere/a.parquet"], "/nowhere"),
        (["compare", "missing.parquet"], "missing.parquet"),
        (["compare", "TRACE"], "cannot read"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each mistake is exit code 2 and one line that names option or file."""
    monkeypatch.chdir(tmp_path)
    path = trace_file(tmp_path)
    assert run("bench", *(str(path) if word == "TRACE" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.strip().splitlines()) == 1


def test_another_parquet_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another kind of Parquet file is recognised."""
    file = tmp_path / "a.parquet"
    write_records(file, synthetic(1.0, 0), [""] * 200, HEADER)
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["error"]), file)
    assert run("bench", "compare", str(file)) == 2
    assert "is no record file" in capsys.readouterr().err
