"""
Mooncake traces (github kvcache-ai/Mooncake, FAST'25): one JSON object per line, with `timestamp` in milliseconds,
`input_length`, `output_length`, and `hash_ids`: one id per 512 tokens of prompt, equal ids meaning equal prefixes up to
that block.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.readers.fields import MAX_ID, Rows, check_blocks, real, whole
from cascadeinfer.workload.trace import Trace

BLOCK_TOKENS: Final = 512
"""Tokens per hashed block, from the paper's trace description."""


def read_mooncake(lines: Iterable[str], *, prefix_block_tokens: int = BLOCK_TOKENS) -> Trace:
    """
    A Mooncake trace; without `hash_ids` in its rows, a trace without prefixes.

    Raises:
        TraceError: A line is not a JSON object, a field is missing or wrong, or only some rows have hashes.
    """
    rows = Rows()
    for line, row in _objects(lines):
        prompt_tokens = whole(_get(row, "input_length", line), "input_length", line)
        kept = rows.add(
            real(_get(row, "timestamp", line), "timestamp", line) / 1000.0,
            prompt_tokens,
            whole(_get(row, "output_length", line), "output_length", line),
            line,
        )
        if kept and "hash_ids" in row:
            ids = _ids(row["hash_ids"], line)
            check_blocks(ids, prompt_tokens, prefix_block_tokens, line)
            rows.hashes.append(ids)
        if kept and rows.hashes and len(rows.hashes) != len(rows.prompts):
            raise TraceError("some rows have hash_ids and some have none", line=line)
    return rows.to_trace(prefix_block_tokens=prefix_block_tokens if rows.hashes else 0)


def read_hash_ids(lines: Iterable[str]) -> dict[int, list[int]]:
    """
    Prefix hashes kept beside a trace in the common form: `{"row_id": 0, "hash_ids": [...]}` per line.

    Raises:
        TraceError: A line is not such an object, or a row_id occurs twice.
    """
    hashes: dict[int, list[int]] = {}
    for line, row in _objects(lines):
        row_id = whole(_get(row, "row_id", line), "row_id", line, most=MAX_ID)
        if row_id in hashes:
            raise TraceError(f"row_id {row_id} comes twice", line=line)
        hashes[row_id] = _ids(_get(row, "hash_ids", line), line)
    return hashes


def _objects(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    decoder = msgspec.json.Decoder(dict[str, object])
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            yield line, decoder.decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"not a JSON object: {error}", line=line) from None


def _get(row: Mapping[str, object], name: str, line: int) -> object:
    if name not in row:
        raise TraceError(f"field {name!r} is missing", line=line)
    return row[name]


def _ids(value: object, line: int) -> list[int]:
    if not isinstance(value, list):
        raise TraceError(f"hash_ids is not a list: {value!r}", line=line)
    return [whole(item, "hash_ids", line, most=MAX_ID) for item in value]
