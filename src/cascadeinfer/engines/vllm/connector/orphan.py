"""
An EngineCore whose front end was killed ends too, instead of holding its memory (and device) for ever.

vLLM's workers watch their EngineCore in this way, but nothing watches the front end: after a `kill -9` of the server the engine processes
would stay. The watch is a daemon thread that sleeps on the parent's sentinel.
"""

import logging
import multiprocessing
import os
import signal
import threading

logger = logging.getLogger(__name__)


def end_with_parent(what: str = "this engine") -> None:
    """From now on, end this process when the process that started it has ended. No parent: nothing to watch."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        logger.error("the front end (pid %s) is gone: %s ends", parent.pid, what)
        os.kill(os.getpid(), signal.SIGKILL)  # the engine's thread may be deep inside a step

    threading.Thread(target=watch, name="cascade-parent-watch", daemon=True).start()
