"""What an operator hears who uses a Ray cluster that is not there: one line, and exit code 2."""

import importlib.util
from typing import Any

import pytest

from cascadeinfer.cli.main import main
from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.ray_here import need_ray


def line_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_without_ray(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The line has the command that installs it."""
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "ray" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModuleNotFoundError):
        need_ray()
    for words in (("cluster", "up"), ("stop", "blue", "--cluster", "ray")):
        assert line_of(capsys, *words).endswith("the package ray is missing (pip install 'cascadeinfer[ray]')")


@pytest.mark.timeout(600)
def test_a_cluster_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The process that would speak with Ray is a real one; it ends."""
    pytest.importorskip("ray")
    address = f"{LOOPBACK}:{free_port()}"
    line = line_of(capsys, "stop", "blue", "--cluster", "ray", "--ray-address", address)
    assert f"--ray-address: no Ray cluster answers at {address}: Connection refused" in line


def test_names_and_ports(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is started."""
    assert "is no name of a fleet" in line_of(capsys, "stop", "a/b", "--cluster", "ray", "--ray-address", "h:1")
    assert "workers" in line_of(capsys, "cluster", "up", "--port", "10002")
