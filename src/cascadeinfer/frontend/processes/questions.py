"""The questions that one process has asked another over their channel, and that wait for their answers."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from cascadeinfer.engines.patience import within
from cascadeinfer.frontend.processes.messages import Answer, Question


class Questions:
    """Those of one end of a channel."""

    def __init__(self) -> None:
        """None yet."""
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()

    async def ask(self, send: Callable[[Any], None], make: Callable[[int], Question], timeout_s: float) -> Answer:
        """
        Ask, and wait for the answer.

        Args:
            send: Sends a message to the other process.
            make: Makes the question with this number, which its answer carries too.
            timeout_s: How long to wait.

        Raises:
            TimeoutError: The other process does not answer, or knows of one that does not.
        """
        number = next(self._numbers)
        waiting = self._answers[number] = asyncio.get_running_loop().create_future()
        send(make(number))
        try:
            return await within(timeout_s, waiting)
        finally:
            self._answers.pop(number, None)

    def answered(self, answer: Answer) -> None:
        """An answer has come; one that is too late is dropped."""
        if (waiting := self._answers.pop(answer.number, None)) is not None and not waiting.done():
            waiting.set_result(answer)
