"""
A refusal in the log is one line, not a traceback.

vLLM logs whatever ends a stream as an error with its traceback, the client's own mistakes and refusals included. A
client could fill the disk with them, and the operator would look for a fault that is none.
"""

import logging

from vllm.exceptions import GracefulHTTPError, VLLMClientError


class OneLineRefusals(logging.Filter):
    """Takes the traceback from records about refusals, and makes them information."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every record on."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, GracefulHTTPError | VLLMClientError):
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
            record.msg, record.args = "refused: %s", (" ".join(str(error).split())[:500],)
            record.exc_info = record.exc_text = None
        return True


def log_refusals_in_one_line() -> None:
    """From now on, in whatever vLLM logs."""
    for handler in logging.getLogger("vllm").handlers:
        if not any(isinstance(known, OneLineRefusals) for known in handler.filters):
            handler.addFilter(OneLineRefusals())
