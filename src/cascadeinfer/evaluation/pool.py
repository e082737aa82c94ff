"""
Runs independent jobs in several processes and pairs each result with its task's number.

Processes are spawned, not forked, because compiled code and its threads do not survive a fork. With one job everything
runs in this process. An interrupted or failed map starts no further tasks.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import TypeVar

from cascadeinfer.core.errors import ConfigError

Task = TypeVar("Task")
Result = TypeVar("Result")


def check_jobs(jobs: int) -> None:
    """
    Refuse more processes than the machine has processors.

    Raises:
        ConfigError: `jobs` is not between 1 and the number of processors.
    """
    most = os.cpu_count() or 1
    if not 1 <= jobs <= most:
        raise ConfigError(f"{jobs} is not between 1 and this machine's {most} processors", option="--jobs")


def map_in_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    jobs: int,
) -> Iterator[tuple[int, Result]]:
    """
    Apply a function to every task. Yields each result, with its task's number, as soon as it is available.

    Args:
        function: Defined at the top level of a module, since other processes import it.
        tasks: Picklable values.
        jobs: Number of processes; 1 runs everything here, in order.
    """
    if jobs == 1 or len(tasks) <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        numbers: dict[Future[Result], int] = {pool.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            waiting = set(numbers)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield numbers[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
