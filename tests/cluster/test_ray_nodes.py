"""What is said of a Ray cluster's nodes, and which address a server uses."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from cascadeinfer.cluster import ray_here
from cascadeinfer.cluster.ray_here import found_address
from cascadeinfer.config.ray_resources import custom_resources
from cascadeinfer.core.errors import ConfigError

ray_nodes = pytest.importorskip("cascadeinfer.cluster.ray_nodes")


def node(address: str, free: Mapping[str, float]) -> object:
    """A node with 8 CPUs and 4 GPUs."""
    return ray_nodes.Node(address, address, {"CPU": 8.0, "GPU": 4.0}, free)


def test_room() -> None:
    """So many instances fit on a node, all of each on that one."""
    assert ray_nodes.n_fitting({"CPU": 8.0, "GPU": 3.0}, {"CPU": 1, "GPU": 2}) == 1
    assert ray_nodes.n_fitting({"CPU": 8.0}, {"CPU": 1, "GPU": 2}) == 0
    assert ray_nodes.n_fitting({"CPU": 8.0}, {"CPU": 3}) == 2


def test_what_is_free_where() -> None:
    """In the words of the one line that refuses a start."""
    nodes = [node("10.0.0.1", {"CPU": 8.0, "GPU": 1.0}), node("10.0.0.2", {})]
    bundle = {"CPU": 1, "GPU": 2}
    assert ray_nodes.in_words(bundle) == "1 CPU and 2 GPU"
    assert ray_nodes.free_words(nodes, bundle) == (
        "10.0.0.1 has 8 of 8 CPU, 1 of 4 GPU free; 10.0.0.2 has 0 of 8 CPU, 0 of 4 GPU free"
    )
    assert ray_nodes.free_words([], bundle) == "there are no nodes"


def test_nodes_are_judged() -> None:
    """Another version, no vLLM, no model: refused. A name that cannot be looked up, no token: said."""
    fit = ("1.0", "0.32", True, True, True)
    assert ray_nodes.judged("a", fit, "/m", "1.0") == []
    for look, why in (
        (("0.9", "0.32", True, True, True), "node a has cascadeinfer 0.9, this is 1.0"),
        (("1.0", None, True, True, True), "node a has no vLLM"),
        (("1.0", "0.32", False, True, True), "MODEL: node a has no /m"),
    ):
        with pytest.raises(ConfigError, match=why):
            ray_nodes.judged("a", look, "/m", "1.0")
    lines = ray_nodes.judged("a", ("1.0", "0.32", True, False, False), "/m", "1.0")
    assert len(lines) == 2
    assert "host name" in lines[0]
    assert "RAY_AUTH_MODE=token" in lines[1]


def test_custom_resources() -> None:
    """As on the command line."""
    assert custom_resources(None) == {}
    assert custom_resources("engine=1, fast=0.5") == {"engine": 1.0, "fast": 0.5}
    for wrong in ("engine", "engine=x", "=1", "engine=0", "engine=inf", "GPU=1", ","):
        with pytest.raises(ConfigError, match="NAME=AMOUNT"):
            custom_resources(wrong)


def test_which_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that is said, the environment's, the one that `up` has started with its token, or Ray's own search."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert found_address(None) is None
    assert found_address("auto") is None
    assert found_address("head:6379") == "head:6379"
    monkeypatch.setattr(ray_here, "head", lambda _=None: ray_here.Head("10.0.0.1:6379", 1, 0.0))
    import os

    assert found_address("head:6379") == "head:6379"
    assert "RAY_AUTH_MODE" not in os.environ
    assert found_address(None) == "10.0.0.1:6379"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    assert found_address(None) == "other:6379"
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name)


def test_up_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second one, and a port of Ray's workers, before anything is started."""
    with pytest.raises(ConfigError, match="workers"):
        ray_here.up("127.0.0.1", 10_002, None, None, tmp_path)
    monkeypatch.setattr(ray_here, "head", lambda _=None: ray_here.Head("10.0.0.1:6379", 1, 0.0))
    with pytest.raises(ConfigError, match=r"one runs already at 10\.0\.0\.1:6379"):
        ray_here.up("127.0.0.1", 6379, None, None, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no Ray runs here"):
        ray_here.down(tmp_path)
