"""
A logging handler in an instance's processes that keeps one word in a file: how far the start is.

It is told from where in vLLM a record comes, never from its text. This module is loaded while logging is set up, before
anything else of ours, and imports nothing beyond the standard library.
"""

import logging
from pathlib import Path
from typing import Final

STAGE_OF: Final = (
    ("vllm.compilation", "compiling"),
    ("vllm.model_executor.model_loader.default_loader", "profiling memory"),  # its one line is the last of the loading
    ("vllm.model_executor.model_loader", "loading the model"),
    ("vllm.v1.core.kv_cache_utils", "making the KV cache"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker", "registering the KV cache"),
    ("vllm.v1.worker", "starting its workers"),
)
"""Beginnings of loggers' names, with what a process does when it logs there; the first that fits counts."""
ORDER: Final = (
    "starting its processes",
    "starting its workers",
    "loading the model",
    "profiling memory",
    "compiling",
    "making the KV cache",
    "registering the KV cache",
)
"""A start goes through these in this order; a late record of an earlier one does not lead back."""


class StageFile(logging.Handler):
    """See the module header."""

    def __init__(self, path: str) -> None:
        """
        Args:
            path: The file; all processes of the instance write to it.
        """
        super().__init__(logging.INFO)
        self._path = Path(path)
        self._reached = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        stage = stage_of(record.name)
        if stage is None or (number := ORDER.index(stage)) <= self._reached:
            return
        self._reached = number
        try:
            said = self._path.read_text(encoding="utf-8")  # by another process of the instance
            if said not in ORDER or ORDER.index(said) < number:
                self._path.write_text(stage, encoding="utf-8")
        except OSError:
            self.handleError(record)


def stage_of(logger_name: str) -> str | None:
    """What a process does that logs under this name; None if that says nothing."""
    return next((stage for prefix, stage in STAGE_OF if logger_name.startswith(prefix)), None)
