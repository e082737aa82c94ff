"""
Readers: public trace formats -> `Trace`, one file per family.

Each takes an iterable of text lines. Malformed input raises `TraceError` with the line number and what is wrong; a row
that the source marks as failed (no output tokens) is left out and counted in `Trace.dropped_rows`. Timestamps become
seconds from the earliest request and rows are sorted by them (stable).
"""

from cascadeinfer.workload.readers.delimited import read_azure, read_burstgpt, read_csv
from cascadeinfer.workload.readers.mooncake import read_hash_ids, read_mooncake
from cascadeinfer.workload.readers.servegen import Client, draw_trace, parse_client
from cascadeinfer.workload.readers.sharegpt import read_sharegpt
from cascadeinfer.workload.readers.sniff import FORMATS, read_trace, sniff

__all__ = [
    "FORMATS",
    "Client",
    "draw_trace",
    "parse_client",
    "read_azure",
    "read_burstgpt",
    "read_csv",
    "read_hash_ids",
    "read_mooncake",
    "read_sharegpt",
    "read_trace",
    "sniff",
]
