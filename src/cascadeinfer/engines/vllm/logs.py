"""Our log lines beside vLLM's."""

import logging


def log_as_vllm_does() -> None:
    """Send our messages (why stages change, which instances die) where vLLM's go, at its level."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("cascadeinfer")
    if theirs.handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        ours.propagate = False
