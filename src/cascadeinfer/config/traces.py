"""
Opens trace files: the I/O that `cascadeinfer.workload` leaves to its callers.

The suffix says how to open a file (`.gz` is gunzipped), its first line what is inside (`workload/readers/sniff.py`).
The name `sample` stands for the trace shipped with the package: 4,083 requests of one hour to a reasoning model, drawn
from the distributions that ServeGen has published of a production service (github.com/alibaba/ServeGen, Apache-2.0).
"""

import gzip
from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TypeVar

from cascadeinfer.core.errors import ConfigError, TraceError
from cascadeinfer.workload.jsonl import to_jsonl
from cascadeinfer.workload.readers import read_csv, read_hash_ids, read_trace
from cascadeinfer.workload.trace import Trace

Result = TypeVar("Result")

SAMPLE = "sample"
SUFFIXES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")


def load_trace(path: str | Path, *, hashes_path: str | Path | None = None) -> Trace:
    """
    Load a trace from a file in any known format.

    Args:
        path: `.csv`, `.jsonl`, or either with `.gz`; or the word `sample`.
        hashes_path: Prefix hashes by row_id for a trace in the common format (such as
            `mooncake_synthetic_hash_ids.jsonl.gz`).

    Raises:
        ConfigError: The file does not exist, cannot be read, or has another suffix.
        TraceError: Its content is malformed.
    """
    if str(path) == SAMPLE:
        return _load_sample(hashes_path)
    trace_path = Path(path)
    if hashes_path is None:
        return _told_where(trace_path, lambda: read_trace(_lines(trace_path)))
    ids_path = Path(hashes_path)
    hashes = _told_where(ids_path, lambda: read_hash_ids(_lines(ids_path, "--prefix-hashes")))
    return _told_where(trace_path, lambda: read_csv(_lines(trace_path), hashes=hashes))


def _load_sample(hashes_path: str | Path | None) -> Trace:
    if hashes_path is not None:
        raise ConfigError("the sample trace has no prefix hashes", option="--prefix-hashes", fix="leave it out")
    with as_file(files("cascadeinfer") / "traces" / "sample.csv.gz") as shipped:
        return load_trace(shipped)


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace as JSON lines; gzip-compressed (without a time stamp) when the name ends in `.gz`."""
    text = "".join(f"{line}\n" for line in to_jsonl(trace)).encode()
    target = Path(path)
    target.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)


def _lines(path: Path, option: str = "--trace") -> Iterator[str]:
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"{path} has no known suffix", option=option, fix=f"one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", option=option)
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig") as text:
                yield from text
        else:
            with path.open(encoding="utf-8-sig") as text:
                yield from text
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", option=option) from error


def _told_where(path: Path, read: Callable[[], Result]) -> Result:
    """Run a reader; errors about the content name the file."""
    try:
        return read()
    except TraceError as error:
        error.add_note(f"in {path}")
        raise
