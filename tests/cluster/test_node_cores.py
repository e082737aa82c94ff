"""Cores shared out among processes that do not know each other."""

from pathlib import Path

import pytest

from cascadeinfer.cluster.node_cores import NodeCores


def test_cores_are_taken_once(tmp_path: Path) -> None:
    """Each holder has its own while there are enough; what is given back is taken again."""
    first, second = NodeCores(tmp_path), NodeCores(tmp_path)
    assert first.take(2, [0, 1, 2]) == "0,1"
    assert second.take(1, [0, 1, 2]) == "2"
    first.give_back()
    assert NodeCores(tmp_path).take(1, [0, 1, 2]) == "0"


def test_too_few_cores_are_shared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And that is said."""
    holder = NodeCores(tmp_path)
    assert holder.take(1, [4, 5]) == "4"
    assert NodeCores(tmp_path).take(2, [4, 5]) == "4,5"
    assert "cores [4] are shared" in caplog.text
    holder.give_back()
