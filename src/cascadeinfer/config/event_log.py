"""Opens the event log of one front-end process as the options ask, and decides what happens if it cannot be written."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import REGISTRY

from cascadeinfer.config.policy import policy_spec
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.eventlog.unwritten_log import ServerLog, UnwrittenLog
from cascadeinfer.eventlog.writer import EventLog, header_of
from cascadeinfer.runtime.gauges import FleetGauges
from cascadeinfer.runtime.metrics import RuntimeMetrics

logger = logging.getLogger(__name__)


def metrics_with(event_log: ServerLog | None) -> Callable[[Callable[[], FleetGauges]], RuntimeMetrics]:
    """What makes the runtime's metrics from what reads the gauges; they tell of this log, if there is one."""
    if event_log is None:
        return lambda read: RuntimeMetrics(REGISTRY, read)
    log = event_log
    return lambda read: RuntimeMetrics(REGISTRY, read, lambda: log.dropped, lambda: log.failure is not None)


@contextlib.contextmanager
def event_log_of(options: ServeOptions, commit: str | None, process: int = 0) -> Iterator[ServerLog | None]:
    """
    The event log that the options ask for, open until the server has stopped; None if they ask for none.

    Args:
        options: The options of `serve`.
        commit: Commit of the running checkout, if any.
        process: Number of the front-end process. A follower writes its own file beside that of process 0. If it cannot,
            it serves without a log, because it may be started while others serve, on a disk that has filled up since.

    Raises:
        ConfigError: Process 0 cannot write its log; its operator is there to read the message.
    """
    if options.event_log is None:
        yield None
        return
    header = header_of(
        policy_spec(options, follows=process > 0),
        source="runtime",
        instances=options.instance_ids,
        commit=commit,
    )
    path = Path(options.event_log)
    if process > 0:
        path = path.with_name(f"{path.stem}.process{process}{path.suffix}")
    log: ServerLog
    try:
        log = EventLog(path, header, max_bytes=options.event_log_mb * 1_000_000, files=options.event_log_files)
    except ConfigError as error:
        if process == 0:
            raise
        logger.error("front-end process %s serves without an event log: %s", process, error)  # noqa: TRY400 - no bug
        log = UnwrittenLog(str(error))
    try:
        yield log
    finally:
        log.close()
