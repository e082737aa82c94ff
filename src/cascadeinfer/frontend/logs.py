"""
What a front-end process logs: our own lines at INFO, vLLM's from ERROR on unless the operator wants more.

vLLM writes some hundred lines while two instances start; what an operator needs of a start is in ours
(`start_report.py`). `--verbose`, `--log-level` or VLLM_LOGGING_LEVEL show vLLM's, in the instances' processes as well.
"""

import dataclasses
import logging
from argparse import Namespace
from typing import Final

from vllm.logger import configure_logging_from_args

QUIET: Final = "ERROR"
LOUD: Final = "INFO"
OWN: Final = "INFO"


def choose_levels(args: Namespace, *, is_said: bool, verbose: bool) -> None:
    """
    Complete the parsed arguments: vLLM's level in `log_level`, ours in `own_log_level`, `is_quiet` for other libraries.

    Args:
        args: The parsed command line; vLLM's options of logging are in it only if they were given.
        is_said: Whether the environment named a level before us.
        verbose: Whether vLLM's own lines are wanted.
    """
    if is_said or "log_level" in args or "logging_config" in args:
        args.own_log_level, args.is_quiet = None, False
        return
    args.is_quiet = not verbose
    args.log_level = LOUD if verbose else QUIET
    args.own_log_level = OWN


def set_up_logs(args: Namespace, *, form: str) -> None:
    """
    Configure logging as vLLM's server does, then ours beside it.

    Args:
        args: With `own_log_level`, see `choose_levels`.
        form: `text` or `json`.
    """
    config = configure_logging_from_args(args)
    args.own_log_level = args.own_log_level or config.log_level
    if form == "json" and config.formatter != form:
        args.logging_config = dataclasses.replace(config, formatter=form)
        configure_logging_from_args(args)
    _log_beside_vllm(args)


def _log_beside_vllm(args: Namespace) -> None:
    """Send our messages where vLLM's go, in the same form; an operator's own file decides about the level, too."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("cascadeinfer")
    if not theirs.handlers:
        return
    ours.propagate = False
    if args.logging_config.pylogging_config_file is not None:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        return
    ours.handlers = [_with_level(handler, args.own_log_level) for handler in theirs.handlers]
    ours.setLevel(args.own_log_level)


def _with_level(handler: logging.Handler, level: str) -> logging.Handler:
    """A handler to the same stream in the same form, of a level of its own; another kind is shared as it is."""
    if not isinstance(handler, logging.StreamHandler):
        return handler
    own = logging.StreamHandler(handler.stream)
    own.setFormatter(handler.formatter)
    own.setLevel(level)
    return own
