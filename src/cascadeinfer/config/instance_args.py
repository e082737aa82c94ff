"""`--instance-args`: engine options of single instances, for stages that need others, such as a smaller batch."""

import re
import shlex
from collections.abc import Sequence
from typing import Final, NoReturn

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.types import InstanceId

OPTION: Final = "--instance-args"
_NUMBERS: Final = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", re.ASCII)


def read_instance_args(text: str, instance_ids: Sequence[InstanceId]) -> dict[InstanceId, tuple[str, ...]]:
    """
    Read the value of the option.

    Args:
        text: `INSTANCES: OPTIONS; INSTANCES: OPTIONS`, with numbers and ranges of them as in `0,2-3`.
        instance_ids: Those of the server's start, which are consecutive numbers from 0.

    Returns:
        Words of a command line for each instance that is named.

    Raises:
        ConfigError: It is malformed, or names an instance twice or one that there is not.
    """
    found: dict[InstanceId, tuple[str, ...]] = {}
    for part in text.split(";"):
        numbers, colon, options = part.partition(":")
        if not colon:
            _refuse(f"{part.strip()!r} is not INSTANCES: OPTIONS")
        try:
            words = tuple(shlex.split(options))
        except ValueError as error:
            _refuse(f"{options.strip()!r}: {str(error).lower()}")
        if not words:
            _refuse(f"no options for {numbers.strip()}")
        for instance_id in _named(numbers, len(instance_ids)):
            if instance_id in found:
                _refuse(f"instance {instance_id} is named twice")
            found[instance_id] = words
    return found


def _named(numbers: str, n_instances: int) -> list[InstanceId]:
    named: list[InstanceId] = []
    for each in numbers.split(","):
        match = _NUMBERS.fullmatch(each)
        if match is None:
            _refuse(f"{each.strip()!r} is no instance: they are numbers from 0 to {n_instances - 1}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            _refuse(f"{each.strip()!r} is an empty range")
        if last >= n_instances:
            _refuse(f"there is no instance {last}: they are numbered from 0 to {n_instances - 1}")
        named += [str(number) for number in range(first, last + 1)]
    return named


def _refuse(why: str) -> NoReturn:
    raise ConfigError(why, option=OPTION, fix="write e.g. '0: --max-num-seqs 8; 1-3: --max-num-seqs 64'")
