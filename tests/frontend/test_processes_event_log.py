"""The event log of several front-end processes, on a disk that accepts no writes."""

import stat
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cascadeinfer.config.event_log import event_log_of
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.events import TimerFired
from cascadeinfer.eventlog.unwritten_log import UnwrittenLog, failure_of
from cascadeinfer.eventlog.writer import EventLog
from cascadeinfer.runtime.gauges import FleetGauges
from cascadeinfer.runtime.metrics import RuntimeMetrics


@pytest.fixture
def options(tmp_path: Path) -> ServeOptions:
    """Two processes with an event log."""
    return ServeOptions(instances=2, stages="0-64:1,64-:1", api_servers=2, event_log=str(tmp_path / "events.jsonl"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be opened for a log."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cascadeinfer.eventlog.writer.RotatedFiles", refuse)


def test_a_follower_has_a_private_file_of_its_own(options: ServeOptions, tmp_path: Path) -> None:
    """Beside that of process 0, readable by the owner only."""
    with event_log_of(options, None) as first, event_log_of(options, None, 1) as second:
        assert isinstance(first, EventLog)
        assert isinstance(second, EventLog)
        assert failure_of(second)() is None
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"events.jsonl": 0o600, "events.process1.jsonl": 0o600}


@pytest.mark.usefixtures("full_disk")
def test_a_follower_on_a_full_disk_serves_without_a_log(
    options: ServeOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """The process starts, logs a warning, counts every event as missing, and can say why."""
    with event_log_of(options, None, 1) as log:
        assert isinstance(log, UnwrittenLog)
        log(0.0, TimerFired("timer"), [])
        assert log.dropped == 1
        assert "No space left on device" in str(failure_of(log)())
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("front-end process 1 serves without an event log: ")
    assert "No space left on device" in line


@pytest.mark.usefixtures("full_disk")
def test_a_server_that_cannot_write_its_log_is_refused(options: ServeOptions) -> None:
    """Unlike a follower's failure, this one is seen by the operator who starts the server."""
    with pytest.raises(ConfigError, match="No space left"), event_log_of(options, None):
        raise AssertionError


def test_metrics_say_that_a_log_has_failed() -> None:
    """`cascadeinfer_event_log_failed` is 1 for a process that serves without its log."""
    for failed in (False, True):
        registry = CollectorRegistry()
        RuntimeMetrics(registry, FleetGauges, lambda: 0, lambda failed=failed: failed)
        assert registry.get_sample_value("cascadeinfer_event_log_failed") == float(failed)
