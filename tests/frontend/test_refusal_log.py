"""A refusal is one line in the log; a fault keeps its traceback."""

import logging
from http import HTTPStatus

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from cascadeinfer.frontend.refusal_log import log_refusals_in_one_line


class Kept(logging.Handler):
    """Keeps the messages that it would write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See Handler."""
        self.written.append((record.levelname, self.format(record)))


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (GracefulHTTPError("too large:\nvery", HTTPStatus.BAD_REQUEST), True),
        (VLLMValidationError("no such thing"), True),
        (ValueError("a bug"), False),
    ],
    ids=["ours", "vLLM's", "a fault"],
)
def test_refusals_are_one_line(error: Exception, *, refused: bool) -> None:
    """As vLLM logs a refusal at the end of a stream; installing the filter twice has the effect of once."""
    kept, theirs = Kept(), logging.getLogger("vllm")
    theirs.addHandler(kept)
    try:
        log_refusals_in_one_line()
        log_refusals_in_one_line()
        logging.getLogger("vllm.entrypoints.somewhere").error("Error in a stream generator.", exc_info=error)
    finally:
        theirs.removeHandler(kept)
    [(level, text)] = kept.written
    if refused:
        assert (level, text) == ("INFO", "refused: " + " ".join(str(error).split()))
    else:
        assert level == "ERROR"
        assert "ValueError: a bug" in text
