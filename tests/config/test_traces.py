"""Opening trace files: suffixes, formats, and errors that name the file."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from cascadeinfer.config.traces import load_trace, save_trace
from cascadeinfer.core.errors import ConfigError, TraceError
from cascadeinfer.workload.trace import Trace

TRACES = Path(__file__).parents[1] / "data" / "traces"
CSV = "arrival_s,prompt_tokens,output_tokens\n0.0,10,3\n1.5,20,4\n"


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_plain_and_compressed(tmp_path: Path, name: str) -> None:
    """The suffix decides how a file is opened."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(CSV.encode()) if name.endswith(".gz") else CSV.encode())
    assert load_trace(path).prompt_tokens.tolist() == [10, 20]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    """A round trip through a file; the same trace gives the same bytes."""
    trace = Trace.from_columns([5, 6], [7, 8], [0.0, 0.1])
    save_trace(trace, tmp_path / name)
    assert load_trace(str(tmp_path / name)).arrival_s.tolist() == [0.0, 0.1]
    before = (tmp_path / name).read_bytes()
    save_trace(trace, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    """A missing file, an unknown suffix, a file that is not gzip, one that is not text."""
    with pytest.raises(ConfigError, match="there is no file"):
        load_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"no known suffix .*\.csv, \.jsonl"):
        load_trace(tmp_path / "t.parquet")
    (tmp_path / "t.csv.gz").write_text(CSV)
    with pytest.raises(ConfigError, match="cannot read"):
        load_trace(tmp_path / "t.csv.gz")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((CSV + "2.0,1,1\n" * 9000).encode())[:-20])
    with pytest.raises(ConfigError, match="cannot read"):
        load_trace(tmp_path / "cut.csv.gz")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_trace(tmp_path / "t.csv")


def test_malformed_content_names_line_and_file(tmp_path: Path) -> None:
    """The line is in the error, the file in its note."""
    (tmp_path / "t.csv").write_text(CSV + "2.0,x,1\n")
    with pytest.raises(TraceError, match="line 4: prompt_tokens is not a number") as caught:
        load_trace(tmp_path / "t.csv")
    assert caught.value.line == 4
    assert any("t.csv" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("name", "rows", "times", "mean_prompt"),
    [
        ("azure_2023_conv", 19_366, True, 1155),
        ("mooncake_synthetic", 1_200, True, 11_842),
        ("servegen_deepseek_r1_1h", 2_552, True, 1957),
        ("sharegpt_v3_firstturn_llama3", 1_087, False, 308),
        ("sharegpt_8k_llama2", 1_921, False, 2279),
        ("arxiv_summarization_llama2", 1_767, False, 2604),
        ("bwb_llama2", 2_111, False, 1065),
    ],
)
def test_traces_are_read_whole(name: str, rows: int, times: bool, mean_prompt: int) -> None:
    """Row counts and mean prompts are those of the files, counted by other means (`zcat`, `awk`)."""
    trace = load_trace(TRACES / f"{name}.csv.gz")
    assert len(trace) == rows
    assert trace.has_arrivals == times
    assert trace.prompt_tokens.mean() == pytest.approx(mean_prompt, abs=0.6)
    assert trace.dropped_rows == 0


def test_prefix_hashes_join_their_trace() -> None:
    """Every request has one hash per started block of 512 tokens, and prefixes repeat."""
    trace = load_trace(
        TRACES / "mooncake_synthetic.csv.gz", hashes_path=TRACES / "mooncake_synthetic_hash_ids.jsonl.gz"
    )
    assert trace.prefix_hashes is not None
    counts = np.array([len(hashes) for hashes in trace.prefix_hashes])
    assert (np.abs(counts - -(-trace.prompt_tokens // 512)) <= 1).mean() > 0.99
    every = [unit for hashes in trace.prefix_hashes for unit in hashes]
    assert len(set(every)) < 0.9 * len(every)


def test_the_sample_is_shipped() -> None:
    """The name `sample` is a trace in the package, with times and mixed lengths but without prefix hashes."""
    trace = load_trace("sample")
    assert len(trace) == 4083
    assert trace.has_arrivals
    assert np.quantile(trace.prompt_tokens, 0.99) > 20 * np.median(trace.prompt_tokens)
    with pytest.raises(ConfigError, match="no prefix hashes"):
        load_trace("sample", hashes_path="ids.jsonl")
