"""Instances come and go; the layout in force follows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.roster import Roster

PLAN = StageLayout.from_boundaries((100, 300), (("a", "b"), ("c",), ("d", "e")))


def shown(roster: Roster) -> str:
    """The layout in force, in one line."""
    assert roster.layout is not None
    return " | ".join(f"{stage.range}: {','.join(stage.instance_ids)}" for stage in roster.layout.stages)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ("abcde", "0-100: a,b | 100-300: c | 300-: d,e"),
        ("abde", "0-100: a,b | 100-: d,e"),
        ("cde", "0-300: c | 300-: d,e"),
        ("abc", "0-100: a,b | 100-: c"),
        ("d", "0-: d"),
    ],
)
def test_empty_stages_are_absorbed(there: str, expected: str) -> None:
    """A stage without an instance goes to the next longer one that has any, the longest to the one below."""
    roster = Roster(PLAN)
    assert roster.follow(list(there))
    assert shown(roster) == expected
    assert not roster.follow(list(there))


def test_nobody_there() -> None:
    """Without instances there is no layout, which is reported as a change only once."""
    roster = Roster(PLAN)
    assert not roster.follow([])
    roster.follow(["a"])
    assert roster.follow([])
    assert roster.layout is None
    assert roster.stage_of == {}


def test_strangers_go_where_instances_lack() -> None:
    """An instance that the plan does not name joins the stage that lacks most, the longest among equals, and stays."""
    roster = Roster(PLAN)
    roster.follow(["a", "c", "d", "x", "y", "z"])
    assert shown(roster) == "0-100: a,y | 100-300: c | 300-: d,x,z"
    roster.follow(["a", "b", "c", "y"])
    assert shown(roster) == "0-100: a,b,y | 100-: c"


def test_without_a_plan_there_is_one_stage() -> None:
    """Each newcomer serves all lengths."""
    roster = Roster()
    roster.follow(["b"])
    roster.follow(["a", "b"])
    assert shown(roster) == "0-: a,b"


def test_boundaries_move_and_survive_absence() -> None:
    """A moved boundary is in force at the next look, even after the stage was empty; a new plan replaces it."""
    roster = Roster(PLAN)
    roster.follow(list("abcde"))
    roster.move_boundary(0, 120)
    roster.follow(list("abde"))
    assert shown(roster) == "0-120: a,b | 120-: d,e"
    roster.follow(list("abcde"))
    assert shown(roster) == "0-120: a,b | 120-300: c | 300-: d,e"
    roster.adopt(StageLayout.from_boundaries((50,), (("a",), ("b", "c", "d", "e"))))
    roster.follow(list("abcde"))
    assert shown(roster) == "0-50: a | 50-: b,c,d,e"
    assert roster.boundaries_tokens == (50,)


@pytest.mark.parametrize("boundary", [0, 300, 400])
def test_boundaries_never_cross(boundary: int) -> None:
    """A boundary that would empty a range is the caller's bug."""
    with pytest.raises(AssertionError):
        Roster(PLAN).move_boundary(0, boundary)


@given(st.lists(st.sets(st.sampled_from("abcdexyz"), max_size=8), max_size=12))
def test_layouts_cover_everybody(history: list[set[str]]) -> None:
    """Every instance is in exactly one stage, and every length has a stage with instances (StageLayout checks that)."""
    roster = Roster(PLAN)
    for there in history:
        roster.follow(sorted(there))
        if roster.layout is None:
            assert not there
            continue
        members = [i for stage in roster.layout.stages for i in stage.instance_ids]
        assert sorted(members) == sorted(there)
        assert roster.stage_of == {i: n for n, s in enumerate(roster.layout.stages) for i in s.instance_ids}
        assert len(roster.plan_stage) == len(roster.layout.stages)


def test_one_takes_over_the_stage_of_another() -> None:
    """Beside it or after it, whatever stage lacks more; an instance that has a stage keeps it."""
    roster = Roster(PLAN)
    roster.follow(list("abcde"))
    roster.succeed("f", "c")
    roster.follow(list("abcdef"))
    assert shown(roster) == "0-100: a,b | 100-300: c,f | 300-: d,e"
    roster.follow(list("abdef"))
    roster.succeed("g", "a")
    roster.succeed("f", "a")
    roster.succeed("h", None)
    roster.follow(list("bdefg"))
    assert shown(roster) == "0-100: b,g | 100-300: f | 300-: d,e"
