"""Logging of an instance's processes: its name in every line, levels, JSON, and how far the start is."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.config.logging import LoggingConfig

from cascadeinfer.cluster.runtime_folder import SOCKETS_VARIABLE, runtime_folder
from cascadeinfer.engines.vllm.instance_logging import InstanceLogs, logging_of
from cascadeinfer.engines.vllm.stage_file import ORDER, STAGE_OF, StageFile, stage_of

PROGRAM = """
import json, logging, logging.config, sys
logging.config.dictConfig(json.load(open(sys.argv[1])))
factory = logging.getLogRecordFactory()
def named(*args, **kwargs):
    record = factory(*args, **kwargs)
    record.vllm_process_name = "EngineCore"
    return record
logging.setLogRecordFactory(named)
logging.getLogger("vllm.model_executor.model_loader.weight_utils").info("read")
logging.getLogger("vllm.v1.worker.gpu_worker").error("broken")
logging.getLogger("cascadeinfer.engines.vllm.connector").info("ours")
"""


def lines_of(folder: Path, form: str) -> tuple[list[str], str]:
    """What a process of instance 7 prints with vLLM at ERROR and ours at INFO, and the stage that it leaves."""
    stage, file = folder / "stage", folder / "logging.json"
    stage.write_text(ORDER[0])
    file.write_text(json.dumps(logging_of("7", str(stage), level="ERROR", own_level="INFO", form=form)))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), stage.read_text()


def test_lines_say_whose_they_are(tmp_path: Path) -> None:
    """Every line begins with the instance; vLLM's INFO is not shown, and is noticed all the same."""
    lines, stage = lines_of(tmp_path, "text")
    assert [line.rpartition("] ")[2] for line in lines] == ["broken", "ours"]
    assert all(line.startswith("(instance 7 EngineCore pid=") for line in lines)
    assert stage == "loading the model"


def test_json_lines_have_the_instance_as_a_field(tmp_path: Path) -> None:
    """One object per line."""
    lines, _ = lines_of(tmp_path, "json")
    objects = [json.loads(line) for line in lines]
    assert [(o["instance"], o["message"], o["levelname"]) for o in objects] == [
        ("7", "broken", "ERROR"), ("7", "ours", "INFO")
    ]  # fmt: skip


def record(name: str) -> logging.LogRecord:
    """A record of this logger."""
    return logging.LogRecord(name, logging.INFO, "", 0, "", (), None)


def test_a_start_only_goes_forward(tmp_path: Path) -> None:
    """Whichever of an instance's processes is further counts, and other loggers say nothing."""
    path = tmp_path / "stage"
    path.write_text(ORDER[0])
    core, worker = StageFile(str(path)), StageFile(str(path))
    worker.emit(record("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker"))
    core.emit(record("vllm.v1.core.kv_cache_utils"))
    core.emit(record("vllm.somewhere.else"))
    assert path.read_text() == "registering the KV cache"
    assert {stage for _, stage in STAGE_OF} == set(ORDER[1:])
    assert stage_of("vllm.somewhere.else") is None


@pytest.fixture(scope="module")
def loggers() -> set[str]:
    """The modules of the installed vLLM."""
    import vllm

    root = Path(vllm.__file__).parent
    return {".".join(("vllm", *path.relative_to(root).with_suffix("").parts)) for path in root.rglob("*.py")}


@pytest.mark.parametrize("prefix", [prefix for prefix, _ in STAGE_OF])
def test_stages_are_told_from_modules_that_exist(prefix: str, loggers: set[str]) -> None:
    """A new version of vLLM that moves one is noticed here."""
    assert any(name.startswith(prefix) for name in loggers)


def test_libraries_are_quiet_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their greetings are switched off by variables that the operator has not set."""
    monkeypatch.setenv("NIXL_LOG_LEVEL", "DEBUG")
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    assert set(InstanceLogs("INFO", is_quiet=True).environment) == {"PYTHONWARNINGS"}
    assert InstanceLogs("INFO").environment == {}


def test_only_the_start_has_the_instances_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes on with its own; an operator's file is left alone; without a server there is no file."""
    monkeypatch.delenv(SOCKETS_VARIABLE, raising=False)
    config = VllmConfig()
    config.logging_config = own = LoggingConfig(log_level="ERROR")
    with InstanceLogs("INFO").logging_as("0", config):
        assert config.logging_config is own
    with runtime_folder() as folder:
        logs = InstanceLogs("INFO")
        assert logs.stage("0") is None
        with logs.logging_as("0", config):
            told = config.logging_config.pylogging_config_file
            assert told is not None
            assert Path(told).parent == folder.path
            assert logs.stage("0") == ORDER[0]
        assert config.logging_config is own
        config.logging_config = theirs = LoggingConfig(pylogging_config_file="/their/own.json")
        with logs.logging_as("1", config):
            assert config.logging_config is theirs
        assert logs.stage("1") is None
