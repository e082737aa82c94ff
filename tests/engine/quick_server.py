"""
`cascadeinfer serve` whose instances start in a second or two: forked from the server, which has imported everything, and restarted at once.

A program of its own, for tests that kill many. Forking beside threads is not safe in general, so the product does not do it. A forked
process would for instance write the signals it gets to the server's event loop, through the file descriptor that it has inherited.
"""

import os
import signal
from functools import partial

from llvmlite.binding import ffi

from cascadeinfer import assemble
from cascadeinfer.cli.main import main
from cascadeinfer.runtime.supervise import SupervisionTimes

if __name__ == "__main__":
    ffi.lib._fntab["__dict__"] = {}  # see tests/conftest.py
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    fork = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # set for the processes only: the configuration resets it
    assemble.make_runtime = partial(assemble.make_runtime, extra_environment=fork)  # type: ignore[assignment]
    assemble.SupervisionTimes = partial(  # type: ignore[misc, assignment]
        SupervisionTimes, backoff_first_s=0.2, backoff_max_s=1.0, steady_s=0.0
    )
    main()
