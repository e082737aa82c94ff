"""
The engine of a keeper, run by it: `python -m cascadeinfer.engines.vllm.kept_engine FOLDER`.

Its configuration is made here, on its own machine: a front end without a device could not make one for a device. Then
this process becomes vLLM's EngineCore, with the keeper as its client number 0 and a door for front ends
(`connector/door.py`).
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor import Executor

from cascadeinfer.cluster.keeping import CONTENT, DOOR, KEEPER_PIPE_VARIABLE, KEY, PLACE, STAGE, PlaceTold, read_json
from cascadeinfer.engines.vllm.configuration import (
    SIDE_CHANNEL_HOST_VARIABLE,
    environment_of,
    instance_config,
    with_cpu_kv_share,
)
from cascadeinfer.engines.vllm.connector.door import KEY_FILE, LISTEN, MARK, ORPHAN_TIMEOUT, TOLD_FILE
from cascadeinfer.engines.vllm.connector.words import TOKEN_VARIABLE, new_token
from cascadeinfer.engines.vllm.instance_logging import logging_of
from cascadeinfer.engines.vllm.kept_order import Content
from cascadeinfer.engines.vllm.stage_file import ORDER


def end_with_keeper() -> None:
    """From now on, end this process and its workers when the keeper has ended."""
    lifeline = int(os.environ.pop(KEEPER_PIPE_VARIABLE))

    def watch() -> None:
        os.read(lifeline, 1)  # nothing is ever sent: it ends with the keeper
        os.killpg(0, signal.SIGKILL)  # the main thread may be deep inside a step

    threading.Thread(target=watch, name="cascade-keeper-watch", daemon=True).start()


def logging_in(folder: Path, content: Content, said: Any) -> Any:
    """
    The configuration of logging for an engine whose output is its log: every line says whose it is, and how far the
    start is goes to a file. An operator's own logging file is left alone.

    Args:
        folder: The instance's.
        content: What it is started with.
        said: What the operator says.
    """
    if not said.configure_logging or said.pylogging_config_file is not None:
        return said
    stage, file = folder / STAGE, folder / "logging"
    stage.write_text(ORDER[0], encoding="utf-8")
    made = logging_of(
        content.instance_id, str(stage), level=said.log_level, own_level=content.own_log_level, form=said.formatter
    )
    file.write_text(json.dumps(made), encoding="utf-8")
    return dataclasses.replace(said, pylogging_config_file=str(file))


def main() -> None:
    """Be the engine until it is told to end."""
    end_with_keeper()
    folder = Path(sys.argv[1])
    content = Content.unpacked((folder / CONTENT).read_bytes())
    place: PlaceTold = read_json(folder / PLACE, PlaceTold)
    os.environ.update(environment_of(place))
    os.environ[SIDE_CHANNEL_HOST_VARIABLE] = place.host
    os.environ[TOKEN_VARIABLE] = new_token()
    engine_args = content.engine_args
    if place.sharers is not None:
        engine_args = with_cpu_kv_share(engine_args, place.sharers)
    config = instance_config(engine_args, content.instance_id, content.settings)
    assert config.kv_transfer_config is not None
    config.kv_transfer_config.kv_connector_extra_config |= {
        LISTEN: f"{place.host}:0",
        KEY_FILE: str(folder / KEY),
        TOLD_FILE: str(folder / DOOR),
        ORPHAN_TIMEOUT: content.orphan_timeout_s,
        MARK: content.mark,
    }
    config.logging_config = logging_in(folder, content, config.logging_config)
    EngineCoreProc.run_engine_core(
        vllm_config=config,
        local_client=True,
        handshake_address=f"ipc://{folder}/handshake",
        executor_class=Executor.get_class(config),
        log_stats=content.log_stats,
    )


if __name__ == "__main__":
    main()
