"""The event log of one front-end process, from the options: where it is, and what happens when it cannot be written."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from cascadeinfer.config.policy import policy_spec
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.eventlog.unwritten_log import ServerLog, UnwrittenLog
from cascadeinfer.eventlog.writer import EventLog, header_of

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def event_log_of(options: ServeOptions, commit: str | None, process: int = 0) -> Iterator[ServerLog | None]:
    """
    The event log that the options ask for, until the server has stopped; None when they ask for none.

    Args:
        commit: Of the checkout that runs, if any.
        process: Which front-end process; a follower writes a file of its own beside that of process 0. One that cannot serves without:
            it may be started while others serve, on a disk that has become full since.

    Raises:
        ConfigError: It cannot be written by process 0, whose operator is there to read this.
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
