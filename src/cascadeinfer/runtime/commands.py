"""Fire-and-forget commands to instances: each runs in its own task, and failures are logged."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)


class Commands:
    """Commands under way. A dead instance answers nothing; any other failure is a bug of ours."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: What one of them is, for the log.
        """
        self._what = what
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, command: Coroutine[Any, Any, None], failed: Callable[[], None] | None = None) -> None:
        """
        Carry out a command, after those sent before it.

        Args:
            failed: Called when it raises, once the failure has been logged.
        """
        task = asyncio.get_running_loop().create_task(command)
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, failed=failed))

    async def stop(self) -> None:
        """Cancel what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None], failed: Callable[[], None] | None) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", self._what, exc_info=error)
            if failed is not None:
                failed()
