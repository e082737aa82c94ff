"""
Make `tests/data` and the sample trace of the package from a folder of public traces and measurements.

    python tools/make_test_data.py ../shared/data

Traces of which a test needs every row are copied; of the others every n-th row is kept. Of the measurements only the
cells compared by the tests are kept. `tests/data/README.md` has sources and licences. The same input gives the same
bytes.
"""

import csv
import gzip
import io
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TEST_DATA: Final = ROOT / "tests" / "data"
SAMPLE: Final = ROOT / "src" / "cascadeinfer" / "traces" / "sample.csv.gz"
EVERY: Final = {
    "azure_2023_conv": 1,
    "servegen_deepseek_r1_1h": 16,
    "sharegpt_v3_firstturn_llama3": 16,
    "sharegpt_8k_llama2": 16,
    "arxiv_summarization_llama2": 16,
    "bwb_llama2": 16,
}
"""Which rows of a trace are kept."""
SAMPLE_EVERY: Final = 10
MOONCAKE_ROWS: Final = 1200
TABLES: Final = ("h100_sxm_vllm_0.24.0", "h200_sxm_vllm_0.24.0", "a100_sxm_vllm_0.14.0", "l40s_vllm_0.24.0")
HEADS: Final = {("32", "8"), ("8", "1"), ("16", "4"), ("8", "2")}
FRONTIER_EVERY: Final = 29


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a compressed CSV file."""
    with gzip.open(path, "rt", newline="") as stream:
        header, *rows = csv.reader(stream)
    return header, rows


def write(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    """The counterpart of `read`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_bytes(path, text.getvalue())


def write_bytes(path: Path, text: str) -> None:
    """Write text, compressed without a time stamp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def traces(source: Path) -> None:
    """Make the traces of the tests, and the sample of the package."""
    for name, every in EVERY.items():
        header, rows = read(source / f"{name}.csv.gz")
        write(TEST_DATA / "traces" / f"{name}.csv.gz", header, rows[::every])
    header, rows = read(source / "mooncake_synthetic.csv.gz")
    write(TEST_DATA / "traces" / "mooncake_synthetic.csv.gz", header, rows[:MOONCAKE_ROWS])
    with gzip.open(source / "mooncake_synthetic_hash_ids.jsonl.gz", "rt") as stream:
        lines = "".join(itertools.islice(stream, MOONCAKE_ROWS))
    write_bytes(TEST_DATA / "traces" / "mooncake_synthetic_hash_ids.jsonl.gz", lines)
    header, rows = read(source / "servegen_deepseek_r1_1h.csv.gz")
    write(SAMPLE, header[:3], (row[:3] for row in rows[::SAMPLE_EVERY]))


def measurements(source: Path) -> None:
    """Make the measured kernel times, and what the reference simulation of thread blocks printed."""
    (TEST_DATA / "gpu").mkdir(parents=True, exist_ok=True)
    output = "splitkv_sim_output.txt"
    (TEST_DATA / "gpu" / output).write_text((source / output).read_text())
    for table in TABLES:
        name = f"aic_decode_attn_{table}.csv.gz"
        header, rows = read(source / name)
        at = {column: header.index(column) for column in header}
        kept = [
            row
            for row in rows
            if (row[at["num_heads"]], row[at["num_key_value_heads"]]) in HEADS
            and int(row[at["kv_len"]]) >= 1024
            and int(row[at["batch_size"]]) <= 256
        ]
        write(TEST_DATA / "gpu" / name, header, kept)
    name = "frontier_a800_flashinfer_llama2-7b_decode.csv.gz"
    header, rows = read(source / name)
    write(TEST_DATA / "gpu" / name, header, rows[::FRONTIER_EVERY])


if __name__ == "__main__":
    data = Path(sys.argv[1])
    traces(data / "traces")
    measurements(data / "gpu")
