"""`cascadeinfer simulate`: the comparison, its files and bad input."""

import errno
import json
import os
from pathlib import Path

import pytest
from experiment_words import run, words_for

from cascadeinfer.cli import simulate as command

TRACES = Path(__file__).parents[1] / "data" / "traces"
PNG = b"\x89PNG"


def small(trace_file: Path, **changes: str) -> list[str]:
    """A quick comparison."""
    return words_for(
        "simulate", trace_file, **({"policy": "cascade,least_loaded", "seeds": "2", "requests": "150"} | changes)
    )


def test_policies_are_compared_on_the_same_requests(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each policy has a row and a run per seed; the same command gives the same figures; stages make requests move."""
    words = small(trace, policy="cascade,static_stages,least_loaded", warm_up="0")
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert run(*words, "--json", str(first)) == 0
    assert run(*words, "--json", str(second)) == 0
    runs = json.loads(first.read_text())["runs"]
    assert runs == json.loads(second.read_text())["runs"]
    assert {name: len(per_seed) for name, per_seed in runs.items()} == {
        "cascade": 2, "static_stages": 2, "least_loaded": 2,
    }  # fmt: skip
    assert all(r["requests"] == 150 and r["unfinished"] == 0 for per_seed in runs.values() for r in per_seed)
    for figure in ("ttft_s", "tpot_s"):
        assert all(r[f"{figure}_p99"] > r[f"{figure}_mean"] for per_seed in runs.values() for r in per_seed)
    moves = {name: sum(r["migrations"] for r in per_seed) for name, per_seed in runs.items()}
    assert moves["static_stages"] > 0
    assert moves["least_loaded"] == 0
    text = capsys.readouterr().out
    assert all(name in text for name in runs)


def test_warm_up_is_not_counted(trace: Path, tmp_path: Path) -> None:
    """With a warm-up of a fifth, four fifths of the requests have figures."""
    out = tmp_path / "a.json"
    assert run(*small(trace, warm_up="0.2", json=str(out))) == 0
    content = json.loads(out.read_text())
    assert content["requests"] == 150
    assert all(r["requests"] == 120 for per_seed in content["runs"].values() for r in per_seed)


def test_ablations_switch_parts_off(trace: Path, tmp_path: Path) -> None:
    """With migration off, nothing moves although there are several stages; a cold start begins with one stage."""
    out = tmp_path / "a.json"
    names = "cascade,cascade-no-migrate,cascade-cold"
    assert run(*small(trace, policy=names, seeds="1", requests="400", json=str(out))) == 0
    runs = {name: per_seed[0] for name, per_seed in json.loads(out.read_text())["runs"].items()}
    assert runs["cascade"]["migrations"] > 0
    assert runs["cascade-no-migrate"]["migrations"] == 0
    stages_at_start = {
        name: max(len(layout["instances"]) for layout in one["layouts"] if layout["since_s"] == 0.0)
        for name, one in runs.items()
    }
    assert stages_at_start["cascade"] == stages_at_start["cascade-no-migrate"] > 1
    assert stages_at_start["cascade-cold"] == 1


def test_duration_says_how_many_requests_come(trace: Path, tmp_path: Path) -> None:
    """Four seconds at 40 requests per second are 160 requests."""
    out = tmp_path / "a.json"
    words = words_for("simulate", trace, policy="round_robin", seeds="1", duration_s="4", json=str(out))
    assert run(*words) == 0
    assert json.loads(out.read_text())["requests"] == 160


def test_processes_make_no_difference(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes give the same figures as one."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    contents = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        assert run(*small(trace, jobs=jobs, json=str(out))) == 0
        contents.append(json.loads(out.read_text())["runs"])
    assert contents[0] == contents[1]


def test_pictures_and_rows_are_written(trace: Path, tmp_path: Path) -> None:
    """Distributions, a timeline per policy, and one Parquet row per request, policy and seed, with provenance."""
    pytest.importorskip("matplotlib")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = tmp_path / "rows.parquet"
    assert run(*small(trace, plot=str(tmp_path / "x"), parquet=str(rows))) == 0
    for name in ("cdf", "timeline-cascade", "timeline-least_loaded"):
        assert (tmp_path / f"x-{name}.png").read_bytes().startswith(PNG)
    table = parquet.read_table(rows)
    assert table.num_rows == 2 * 2 * 150
    assert set(table.column("policy").to_pylist()) == {"cascade", "least_loaded"}
    finished = table.to_pydict()
    assert all(
        a < f < e
        for a, f, e in zip(finished["arrival_s"], finished["first_token_s"], finished["finish_s"], strict=True)
    )
    assert json.loads(table.schema.metadata[b"cascadeinfer"])["provenance"]["seeds"] == [0, 1]


def test_rate_above_capacity_needs_a_word(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A demand above capacity is refused, with the capacity; `--overload` runs it anyway."""
    words = small(trace, rate="5000", policy="cascade,round_robin", seeds="1")
    assert run(*words) == 2
    assert "capacity of 8 instances" in capsys.readouterr().err
    assert run(*words, "--overload") == 0


def test_short_run_is_told(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that ends before the cluster can fill comes with a note; a long one does not."""
    assert run(*small(trace, policy="round_robin", seeds="1", requests="60")) == 0
    assert "does not fill" in capsys.readouterr().err
    assert run(*small(trace, policy="round_robin", seeds="1", requests="700")) == 0
    assert "does not fill" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": "magic"}, "least_loaded"),
        ({"policy": ""}, "--policy"),
        ({"policy": "cascade,cascade"}, "named twice"),
        ({"profile": "h900-llama"}, "h100-llama-3.1-8b"),
        ({"rate": "nan"}, "--rate"),
        ({"rate": "0"}, "--rate"),
        ({"instances": "0"}, "--instances"),
        ({"seeds": "0"}, "--seeds"),
        ({"requests": "0"}, "--requests"),
        ({"duration_s": "5"}, "not both"),
        ({"jobs": "0"}, "--jobs"),
        ({"jobs": "100000"}, "--jobs"),
        ({"warm_up": "1"}, "--warm-up"),
        ({"tpot_slo": "inf"}, "--tpot-slo"),
        ({"parquet": "/nowhere/rows"}, "/nowhere"),
        ({"plot": "/nowhere/x"}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], says: str
) -> None:
    """Each mistake ends in exit code 2 and one line, before anything is simulated."""
    assert run(*small(trace, **changes)) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""


def test_missing_package_is_told_before_the_runs(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without matplotlib, `--plot` names the extra at once."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setattr(command, "_run_all", lambda *_args, **_options: pytest.fail("simulated"))
    assert run(*small(trace, plot="x")) == 2
    assert "pip install 'cascadeinfer[figures]'" in capsys.readouterr().err


def timed_trace(folder: Path) -> Path:
    """400 requests that arrive in bursts of ten."""
    file = folder / "timed.csv"
    file.write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i // 10},{500 + i},50\n" for i in range(400))
    )
    return file


def test_arrivals_follow_the_law_that_is_named(tmp_path: Path) -> None:
    """Bursts wait longer than a Poisson stream of the same rate; a recorded stretch differs from both."""
    seen = {}
    trace = timed_trace(tmp_path)
    for law in ("poisson", "gamma:5", "recorded"):
        out = tmp_path / "a.json"
        assert run(*small(trace, policy="least_loaded", seeds="3", requests="300", arrivals=law, json=str(out))) == 0
        content = json.loads(out.read_text())
        assert content["arrivals"]["kind"] == law.partition(":")[0]
        seen[law] = sum(r["ttft_s_mean"] for r in content["runs"]["least_loaded"])
    assert seen["gamma:5"] > seen["poisson"]
    assert len(set(seen.values())) == 3


@pytest.mark.parametrize("law", ["often", "gamma", "gamma:0", "gamma:-1", "gamma:nan", "poisson:2"])
def test_unknown_laws_of_arrivals_are_refused(trace: Path, law: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the option."""
    assert run(*small(trace, arrivals=law)) == 2
    assert "--arrivals" in capsys.readouterr().err


def test_recorded_arrivals_need_enough_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace without times, or with fewer requests than wanted, cannot be replayed."""
    assert run(*small(timed_trace(tmp_path), arrivals="recorded", requests="100000")) == 2
    assert "recorded requests are wanted" in capsys.readouterr().err
    timeless = tmp_path / "timeless.csv"
    timeless.write_text("arrival_s,prompt_tokens,output_tokens\n" + ",100,10\n" * 200)
    assert run(*small(timeless, arrivals="recorded")) == 2
    assert "no arrival times" in capsys.readouterr().err


def test_conversations_return_to_their_cache(tmp_path: Path) -> None:
    """On the trace with prefix hashes, the cascade's affinity makes the mean TTFT at least a tenth shorter."""
    out = tmp_path / "a.json"
    hashes = str(TRACES / "mooncake_synthetic_hash_ids.jsonl.gz")
    words = small(
        TRACES / "mooncake_synthetic.csv.gz", policy="cascade,cascade-no-affinity", seeds="1", requests="1000",
        rate="10", prefix_hashes=hashes, json=str(out),
    )  # fmt: skip
    assert run(*words) == 0
    [[with_affinity], [without]] = json.loads(out.read_text())["runs"].values()
    assert with_affinity["ttft_s_mean"] < 0.9 * without["ttft_s_mean"]
    assert with_affinity["normalised_latency_s_mean"] < without["normalised_latency_s_mean"]


def test_prefixes_are_shared_when_the_trace_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With hashes, a repeated prompt is computed once and first tokens come sooner; without, the option is refused."""
    lengths = tmp_path / "trace.csv"
    lengths.write_text(
        "arrival_s,prompt_tokens,output_tokens,row_id\n" + "".join(f"{i},4096,20,{i}\n" for i in range(300))
    )
    hashes = tmp_path / "hashes.jsonl"
    hashes.write_text("".join(json.dumps({"row_id": i, "hash_ids": list(range(8))}) + "\n" for i in range(300)))
    ttft_s = {}
    for name, words in {"computed": {}, "shared": {"prefix_hashes": str(hashes)}}.items():
        out = tmp_path / f"{name}.json"
        assert run(*small(lengths, policy="least_loaded", seeds="1", json=str(out), **words)) == 0
        ttft_s[name] = json.loads(out.read_text())["runs"]["least_loaded"][0]["ttft_s_mean"]
    assert ttft_s["shared"] < 0.7 * ttft_s["computed"]
    assert run(*small(lengths), "--prefix-caching") == 2
    assert "--prefix-hashes" in capsys.readouterr().err


def test_outputs_are_checked_before_the_work(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder instead of a file ends in one line that names the option, before anything is simulated."""
    for option in ("json", "parquet", "event_log"):
        assert run(*small(trace, **{option: str(tmp_path)})) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        assert f"--{option.replace('_', '-')}: {tmp_path} is a folder" in told.err


def test_a_missing_file_of_hashes_is_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the option that gave the file."""
    assert run(*small(trace, prefix_hashes="nope.jsonl")) == 2
    assert "--prefix-hashes: there is no file nope.jsonl" in capsys.readouterr().err


def test_a_complaint_about_a_trace_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line, column and file, in one line."""
    bad = tmp_path / "bad.csv"
    bad.write_text("arrival_s,prompt_tokens,output_tokens\n0,1e30,5\n")
    assert run(*small(bad)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "line 2: prompt_tokens is above" in told
    assert str(bad) in told


@pytest.mark.parametrize(
    ("option", "name", "written"),
    [
        ("--event-log", "log.gz", "log.gz"),
        ("--json", "a.json", "a.json"),
        ("--parquet", "rows", "rows"),
        ("--plot", "x", "x-cdf.png"),
    ],
)
def test_a_full_disk_ends_in_one_line(
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    written: str,
) -> None:
    """A file that passes the check but cannot be written is named with its option, and nothing of it is left."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("pyarrow")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", fail)
    folder = tmp_path / "out"
    folder.mkdir()
    words = small(trace, policy="least_loaded", seeds="1", requests="2000")
    assert run(*words, option, str(folder / name)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cascadeinfer: error: {option}: cannot write {folder / written}: No space left on device (")
    assert list(folder.iterdir()) == []
