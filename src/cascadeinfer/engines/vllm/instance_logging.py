"""
How an instance's processes log: every line says whose it is, and the front end hears how far a start is.

vLLM configures logging in each of its processes from the `LoggingConfig` in its `VllmConfig`, which may name a file in
the form of `logging.config.dictConfig`. Each instance gets such a file in the server's folder. It has handlers for what
the operator reads, with the instance in every line, and a `StageFile`.

An operator's own logging file is left alone: then lines carry no instance, and a start shows no stages.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.process_start import operator_environment
from cascadeinfer.cluster.runtime_folder import NAME, SOCKETS_VARIABLE
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.stage_file import ORDER, StageFile

TEXT: Final = (
    "(instance {} %(vllm_process_name)s pid=%(process)d) %(levelname)s %(asctime)s "
    "[%(fileinfo)s:%(lineno)d] %(message)s"
)
JSON: Final = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"
DATE: Final = "%m-%d %H:%M:%S"
QUIET: Final = {"NIXL_LOG_LEVEL": "WARN", "PYTHONWARNINGS": "ignore::FutureWarning"}
"""What keeps libraries from greeting each process of each instance."""


class InstanceLogs:
    """The logging files and stage files of one server's instances."""

    def __init__(self, own_level: str, *, is_quiet: bool = False) -> None:
        """
        Args:
            own_level: The least level of our own lines that the operator reads; vLLM's level is in its configuration.
            is_quiet: Whether nobody asked for the lines of libraries.
        """
        self._own_level = own_level
        self._is_quiet = is_quiet
        self._folder = server_folder()
        self._last: dict[InstanceId, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the instances' processes; the operator's win."""
        return {name: value for name, value in QUIET.items() if self._is_quiet and name not in operator_environment()}

    def args_for_all(self, engine_args: AsyncEngineArgs) -> AsyncEngineArgs:
        """The engine arguments, without a progress bar in every worker if nobody asked for such."""
        return dataclasses.replace(engine_args, use_tqdm_on_load=False) if self._is_quiet else engine_args

    @contextlib.contextmanager
    def logging_as(self, instance_id: InstanceId, config: VllmConfig) -> Iterator[None]:
        """
        Processes that start in this context with this configuration log as this instance, unless the operator says how.

        Afterwards the configuration is as before: this process configures its own logging from it.
        """
        told: Any = config.logging_config
        if self._folder is None or not told.configure_logging or told.pylogging_config_file is not None:
            yield
            return
        stage = self._stage_file(instance_id)
        file = self._folder / f"logging-{instance_id}.json"
        for made in (stage, file):
            made.touch(mode=0o600)
        stage.write_text(ORDER[0], encoding="utf-8")
        content = logging_of(
            instance_id, str(stage), level=told.log_level, own_level=self._own_level, form=told.formatter
        )
        file.write_text(json.dumps(content), encoding="utf-8")
        config.logging_config = dataclasses.replace(told, pylogging_config_file=str(file))
        try:
            yield
        finally:
            config.logging_config = told

    def stage(self, instance_id: InstanceId) -> str | None:
        """How far an instance's start is; None if that is unknown."""
        if self._folder is None:
            return None
        try:
            told = self._stage_file(instance_id).read_text(encoding="utf-8")
        except FileNotFoundError:  # the operator's own logging
            return None
        if told in ORDER:  # else it is being written
            self._last[instance_id] = told
        return self._last.get(instance_id)

    def _stage_file(self, instance_id: InstanceId) -> Path:
        assert self._folder is not None
        return self._folder / f"stage-{instance_id}"


def server_folder() -> Path | None:
    """The private folder of this server; None outside of a server."""
    said = operator_environment().get(SOCKETS_VARIABLE)
    return Path(said) if said is not None and NAME.fullmatch(Path(said).name) else None


def logging_of(instance_id: InstanceId, stage_file: str, *, level: str, own_level: str, form: str) -> dict[str, Any]:
    """
    The logging of an instance's processes, for `logging.config.dictConfig`.

    Args:
        instance_id: Named in every line.
        stage_file: See StageFile.
        level: The least level of vLLM's lines that the operator reads.
        own_level: The same of ours.
        form: `text` or `json`.
    """
    text = {"()": "vllm.logging_utils.NewLineFormatter", "format": TEXT.format(instance_id), "datefmt": DATE}
    fields = {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": JSON, "static_fields": {"instance": instance_id}}
    read = {"class": "logging.StreamHandler", "formatter": "own", "stream": "ext://sys.stdout"}
    stage = {"()": f"{StageFile.__module__}.{StageFile.__name__}", "path": stage_file}
    least = "DEBUG" if "DEBUG" in {level, own_level} else "INFO"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"own": fields if form == "json" else text},
        "handlers": {"vllm": {**read, "level": level}, "cascadeinfer": {**read, "level": own_level}, "stage": stage},
        "loggers": {
            "vllm": {"handlers": ["vllm", "stage"], "level": least, "propagate": False},
            "cascadeinfer": {"handlers": ["cascadeinfer"], "level": own_level, "propagate": False},
        },
    }
