"""
Logs a refusal as one line instead of a traceback.

vLLM logs whatever ends a stream as an error with its traceback, including client mistakes and refusals. A client could
fill the disk with them, and operators would search for a fault that does not exist.
"""

import logging

from vllm.exceptions import GracefulHTTPError, VLLMClientError


class OneLineRefusals(logging.Filter):
    """Strips the traceback from records about refusals and lowers them to INFO."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every record on."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, GracefulHTTPError | VLLMClientError):
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
            record.msg, record.args = "refused: %s", (" ".join(str(error).split())[:500],)
            record.exc_info = record.exc_text = None
        return True


def log_refusals_in_one_line() -> None:
    """Apply this to all of vLLM's logging from now on."""
    for handler in logging.getLogger("vllm").handlers:
        if not any(isinstance(known, OneLineRefusals) for known in handler.filters):
            handler.addFilter(OneLineRefusals())
