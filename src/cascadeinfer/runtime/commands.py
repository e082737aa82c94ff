"""Commands to instances that nobody waits for: each in a task of its own, its failure in the log."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)


class Commands:
    """Commands under way. A dead instance answers nothing; what fails beyond that is our own bug."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: What one of them is, for the log.
        """
        self._what = what
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, command: Coroutine[Any, Any, None], failed: Callable[[], None] | None = None) -> None:
        """
        Carry out a command, in order with those before it.

        Args:
            failed: Called when it raises, after that is in the log.
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
