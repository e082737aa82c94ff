"""Our own file format for traces: lines of JSON, a header and then one request per line. A round trip loses nothing."""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.trace import Trace

FORMAT: Final = "cascadeinfer-trace"
FORMAT_VERSION: Final = 1


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    has_arrivals: bool
    prefix_block_tokens: int
    dropped_rows: int


class _Row(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    prefix_hashes: tuple[int, ...] | None = None


def to_jsonl(trace: Trace) -> Iterator[str]:
    """The trace as lines of JSON, without line ends."""
    encoder = msgspec.json.Encoder()
    header = _Header(FORMAT, FORMAT_VERSION, trace.has_arrivals, trace.prefix_block_tokens, trace.dropped_rows)
    yield encoder.encode(header).decode()
    for index in range(len(trace)):
        row = _Row(
            int(trace.prompt_tokens[index]),
            int(trace.output_tokens[index]),
            float(trace.arrival_s[index]) if trace.has_arrivals else None,
            trace.prefix_hashes[index] if trace.prefix_hashes is not None else None,
        )
        yield encoder.encode(row).decode()


def from_jsonl(lines: Iterable[str]) -> Trace:
    """
    Read what `to_jsonl` wrote.

    Raises:
        TraceError: The header is missing or of another version, a line is not such JSON, or a field is missing or
            wrong.
    """
    rows: list[_Row] = []
    header: _Header | None = None
    row_decoder = msgspec.json.Decoder(_Row)
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            if header is None:
                header = msgspec.json.decode(text, type=_Header)
                if (header.format, header.version) != (FORMAT, FORMAT_VERSION):
                    raise TraceError(f"not a {FORMAT} file of version {FORMAT_VERSION}", line=line)
                continue
            row = row_decoder.decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(str(error), line=line) from None
        if (row.arrival_s is not None) != header.has_arrivals:
            raise TraceError("arrival_s does not agree with the header's has_arrivals", line=line)
        if (row.prefix_hashes is not None) != (header.prefix_block_tokens > 0):
            raise TraceError("prefix_hashes does not agree with the header's prefix_block_tokens", line=line)
        rows.append(row)
    if header is None:
        raise TraceError("the file is empty")
    return Trace.from_columns(
        [row.prompt_tokens for row in rows],
        [row.output_tokens for row in rows],
        [row.arrival_s or 0.0 for row in rows] if header.has_arrivals else None,
        prefix_hashes=[row.prefix_hashes or () for row in rows] if header.prefix_block_tokens else None,
        prefix_block_tokens=header.prefix_block_tokens,
        dropped_rows=header.dropped_rows,
    )
