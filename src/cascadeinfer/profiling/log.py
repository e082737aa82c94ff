"""
The measured steps, on disk as they arrive: a header line, then one JSON line per batch run.

The file lies beside the profile and survives an interruption: what is in it is not measured again. A line cut short by
an interruption is dropped. The header identifies the engine; resuming with another engine is refused.
"""

import os
from pathlib import Path
from typing import Annotated, Final, NamedTuple, Self

import msgspec

from cascadeinfer.core.cost.identity import EngineIdentity, foreign, stale
from cascadeinfer.core.errors import ConfigError

LOG_VERSION: Final = 1
SUFFIX: Final = ".samples.jsonl"


class MeasuredStep(NamedTuple):
    """One step as the engine saw it: the fields of `BatchFeatures` and its duration."""

    n_decode: int
    kv_tokens: int
    kv_tokens_max: int
    prefill_tokens: int
    prefill_attention_tokens: float
    step_s: float


class BatchRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    One run of one kind of batch.

    Attributes:
        kind: The kind's name.
        round: Repetition of the grid, from 0.
        wall_s: From the first request sent to the last steps reported, at the client.
        steps: The engine's steps meanwhile, in order.
    """

    kind: str
    round: Annotated[int, msgspec.Meta(ge=0)]
    wall_s: float
    steps: list[MeasuredStep]


class PullRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One transfer of KV between two instances: its tokens, and the seconds until the target went on, less one step."""

    pulled_tokens: Annotated[int, msgspec.Meta(ge=1)]
    pull_s: float


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine that the steps were measured on."""

    log_version: int
    engine: EngineIdentity
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    max_model_tokens: int


class SampleLog:
    """The file, open for appending, and its contents."""

    def __init__(self, path: Path) -> None:
        """A log at this path, not yet open."""
        self.path = path
        self.runs: list[BatchRun] = []
        self.pulls: list[PullRun] = []
        self._descriptor: int | None = None
        self._size = 0

    def check(self, *, resume: bool) -> None:
        """
        Refuse what cannot work, before anything is measured.

        Raises:
            ConfigError: There are unwanted steps of an earlier run, wanted ones are missing, or the file cannot be
                written.
        """
        has_steps = self.path.exists() and self.path.stat().st_size > 0
        if has_steps and not resume:
            raise ConfigError(
                f"{self.path} has steps of an earlier run",
                option="--output",
                fix="go on with them by --resume, or remove the file",
            )
        if resume and not has_steps:
            raise ConfigError(f"there are no steps in {self.path} to go on with", option="--resume", fix="leave it out")
        try:
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise self._unwritable(error) from error
        if not has_steps and self.path.is_file():
            self.path.unlink()

    def open(self, header: Header) -> None:
        """
        Read the existing log and prepare to append.

        Raises:
            ConfigError: Its steps are from another engine, the file is not a log, or it cannot be written; in that case
                a log without steps is removed.
        """
        if self.path.is_file() and self.path.stat().st_size > 0:
            self._read(header)
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        if self._size:
            os.ftruncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
            return
        try:
            self._write(header)
        except OSError as error:
            self.path.unlink()
            raise self._unwritable(error) from error

    def add(self, run: BatchRun) -> None:
        """Append a run. Raises ConfigError when it cannot be written; earlier runs are kept."""
        self._append(run)
        self.runs.append(run)

    def add_pull(self, run: PullRun) -> None:
        """Append a transfer. Raises as `add`."""
        self._append(run)
        self.pulls.append(run)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path} cannot be written: {error.strerror}", option="--output", fix="make room, or write elsewhere"
        )

    def _write(self, record: Header | BatchRun | PullRun) -> None:
        """Append a line. Raises OSError."""
        assert self._descriptor is not None, "open it first"
        line = msgspec.json.encode(record) + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def _append(self, record: BatchRun | PullRun) -> None:
        try:
            self._write(record)
        except OSError as error:
            raise ConfigError(
                f"{self.path} takes no more: {error.strerror}; {len(self.runs)} batches are kept",
                option="--output",
                fix="make room and go on with --resume",
            ) from error

    def _read(self, header: Header) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = whole.splitlines()
        try:
            before = msgspec.json.decode(lines[0] if lines else b"", type=Header)
            for line in lines[1:]:
                if b'"pulled_tokens"' in line[:32]:
                    self.pulls.append(msgspec.json.decode(line, type=PullRun))
                else:
                    self.runs.append(msgspec.json.decode(line, type=BatchRun))
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"{self.path} is no file of steps: {error}", option="--resume", fix="remove it, and start anew"
            ) from None
        self._refuse_others(before, header)
        self._size = len(whole)

    def _refuse_others(self, before: Header, header: Header) -> None:
        different = [*foreign(before.engine, header.engine), *stale(before.engine, header.engine)]
        different += [
            f"{name}: {getattr(before, name)} then, {getattr(header, name)} now"
            for name in Header.__struct_fields__
            if name != "engine" and getattr(before, name) != getattr(header, name)
        ]
        if different:
            raise ConfigError(
                f"the steps in {self.path} are of another engine ({'; '.join(different)})",
                option="--resume",
                fix="give the same options as then, or remove the file",
            )
