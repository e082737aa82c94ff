"""The GPU check's table of moved texts, on this suite's instances: what our rules do not pin keeps its text."""

import sys
from pathlib import Path

import pytest
from zoo import KINDS, OTHER, RUNNER, Zoo

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu_check"))

from row_log import RowLog

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_every_case_has_its_rows(zoo: Zoo, tmp_path: Path) -> None:
    """
    Each runs without a move, and with two moves both ways; the text is the same unless the case is pinned.

    On a busy machine some requests end before their second move.
    """
    from move_texts import CASES, MOVES_AFTER, measure

    name = next(name for name, kind in KINDS.items() if not kind.caches)
    with RowLog(tmp_path / "rows.jsonl", {}) as log:
        assert await measure(zoo, (zoo.instances[name], zoo.instances[OTHER[name]]), log) == 0
        rows = log.rows
    assert [row["key"] for row in rows] == [f"{case}, {way}" for case in CASES for way in WAYS]
    assert {row["runner"] for row in rows} == {RUNNER}
    for way in WAYS:
        moves = {row["moves"] for row in rows if row["way"] == way}
        assert max(moves) == (0 if way == "no move" else len(MOVES_AFTER)), way
    assert [row["key"] for row in rows if not row["same"] and (row["way"] == "no move" or row["pinned"] is None)] == []


WAYS = ("no move", "pull", "recompute")
