"""
An engine's processes, and further front ends, end with their parent process instead of holding memory (and device) for
ever.

Nothing in vLLM watches the front end: after a `kill -9` of the server the EngineCores would stay. Its workers do watch
their EngineCore, but then leave through shutdowns that may hang. The watch is a daemon thread that sleeps on the
parent's sentinel.
"""

import logging
import multiprocessing
import os
import signal
import threading

logger = logging.getLogger(__name__)


def end_with_parent() -> None:
    """From now on, end this process when its parent has ended. Does nothing without a parent."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        logger.error("the process that started this one (pid %s) is gone: this one ends", parent.pid)
        os.kill(os.getpid(), signal.SIGKILL)  # the main thread may be deep inside a step

    threading.Thread(target=watch, name="cascade-parent-watch", daemon=True).start()
