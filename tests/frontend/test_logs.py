"""Levels of a server's log: vLLM's errors and our own lines, unless the operator wants something else."""

import json
import logging
from argparse import Namespace
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from cascadeinfer.frontend.logs import choose_levels, set_up_logs


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """The loggers of this process are as they were."""
    before = [(name, logging.getLogger(name)) for name in ("vllm", "cascadeinfer")]
    kept = [(log, list(log.handlers), log.level, log.propagate) for _, log in before]
    yield
    for log, handlers, level, propagate in kept:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def args_of(*, is_said: bool = False, verbose: bool = False, **given: object) -> Namespace:
    """Arguments completed for these options."""
    args = Namespace(**given)
    choose_levels(args, is_said=is_said, verbose=verbose)
    return args


@pytest.mark.parametrize(
    ("args", "theirs", "ours"),
    [
        (args_of(), "ERROR", "INFO"),
        (args_of(verbose=True), "INFO", "INFO"),
        (args_of(log_level="DEBUG"), "DEBUG", "DEBUG"),
        (args_of(log_level="WARNING", verbose=True), "WARNING", "WARNING"),
    ],
    ids=["nothing said", "-v", "--log-level", "both"],
)
def test_levels(args: Namespace, theirs: str, ours: str) -> None:
    """What the operator says about the level goes for both; otherwise only our own lines are shown below errors."""
    set_up_logs(args, form="text")
    for name, level in (("vllm", theirs), ("cascadeinfer", ours)):
        log = logging.getLogger(name)
        assert not log.propagate
        assert logging.getLevelName(max(log.level, log.handlers[0].level)) == level
    assert args.own_log_level == ours


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Our lines are objects like vLLM's, with level, logger and message."""
    set_up_logs(args_of(), form="json")
    logging.getLogger("cascadeinfer.frontend").info("ready: %s", "http://x")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["message"], told["levelname"], told["name"]) == ("ready: http://x", "INFO", "cascadeinfer.frontend")
