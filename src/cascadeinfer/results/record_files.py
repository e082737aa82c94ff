"""
Records of one run on a live server as a Parquet file: the columns of `RequestRecords`, errors per request, and
provenance.

The schema's metadata holds, under `cascadeinfer`, a JSON object with label, SLO, warm-up and provenance. Needs the
extra `bench`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.results.output_files import replacing
from cascadeinfer.results.records import RequestRecords

METADATA_KEY: Final = b"cascadeinfer"
ERROR_COLUMN: Final = "error"


@dataclass(frozen=True, slots=True, eq=False)
class RecordFile:
    """
    One run.

    Attributes:
        records: One row per request.
        errors: Per request, what went wrong (`kind: detail`); empty when nothing did.
        header: Label, SLO, warm-up, provenance.
    """

    records: RequestRecords
    errors: tuple[str, ...]
    header: dict[str, Any]

    @property
    def label(self) -> str:
        """Name of what was measured; runs with the same label are repetitions."""
        return str(self.header.get("label", ""))


def write_records(file: Path, records: RequestRecords, errors: Sequence[str], header: dict[str, Any]) -> None:
    """
    Write a run.

    Raises:
        ConfigError: The file cannot be written.
    """
    columns = {f.name: pa.array(getattr(records, f.name)) for f in fields(records)}
    table = pa.table({**columns, ERROR_COLUMN: pa.array(list(errors), pa.string())})
    with replacing(file, "--out") as beside:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(header)}), beside)


def read_records(file: Path) -> RecordFile:
    """
    Read a run back.

    Raises:
        ConfigError: The file does not exist or is not of this kind.
    """
    try:
        table = pq.read_table(file)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {file}") from error
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read {file}: {error}", fix="a file that `cascadeinfer bench --out` wrote") from error
    missing = [f.name for f in fields(RequestRecords) if f.name not in table.column_names]
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if missing or metadata is None or ERROR_COLUMN not in table.column_names:
        raise ConfigError(f"{file} is no record file", fix="a file that `cascadeinfer bench --out` wrote")
    columns = {f.name: np.asarray(table[f.name].to_numpy()) for f in fields(RequestRecords)}
    return RecordFile(RequestRecords(**columns), tuple(table[ERROR_COLUMN].to_pylist()), json.loads(metadata))
