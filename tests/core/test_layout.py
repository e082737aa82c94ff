"""Stage layouts: what is a layout and what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import Proposal, Stage, StageLayout
from cascadeinfer.core.types import LengthRange

A, B = ("a",), ("b",)


def test_single_is_one_stage_with_all() -> None:
    """One stage for everything, its instances sorted."""
    layout = StageLayout.single(("b", "a"))
    assert layout.stages == (Stage(LengthRange(0), ("a", "b")),)
    assert layout.boundaries_tokens == ()
    assert layout.stage_index_of(10**9) == 0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((Stage(LengthRange(1), A),), "must start at 0, not 1"),
        ((Stage(LengthRange(0, 9), A),), "last stage must be unbounded, as in 0-"),
        ((Stage(LengthRange(0, 5), A), Stage(LengthRange(6), B)), "gap between stages 0-5 and 6-"),
        ((Stage(LengthRange(0, 5), A), Stage(LengthRange(4), B)), "overlap between stages 0-5 and 4-"),
        ((Stage(LengthRange(0, 5), A), Stage(LengthRange(5), ())), "stage 5- has no instance"),
        ((Stage(LengthRange(0, 5), A), Stage(LengthRange(5), A)), "instance a is in two stages"),
        ((Stage(LengthRange(0), ("a", "a")),), "instance a is in two stages"),
    ],
)
def test_bad_layouts_are_refused(stages: tuple[Stage, ...], message: str) -> None:
    """Stages that do not tile the lengths, are empty or share instances are no layout."""
    with pytest.raises(PlanError, match=message):
        StageLayout(stages)


@pytest.mark.parametrize(
    ("boundaries", "groups", "message"),
    [
        ((5,), (A,), "1 boundaries make 2 stages, not 1"),
        ((5, 5), (A, B, ("c",)), "not strictly increasing"),
        ((7, 5), (A, B, ("c",)), "not strictly increasing"),
        ((0,), (A, B), "not strictly increasing"),
    ],
)
def test_bad_boundaries_are_refused(
    boundaries: tuple[int, ...], groups: tuple[tuple[str, ...], ...], message: str
) -> None:
    """Boundaries must increase strictly, and there must be one fewer than groups."""
    with pytest.raises(PlanError, match=message):
        StageLayout.from_boundaries(boundaries, groups)


@given(st.lists(st.integers(1, 10**6), unique=True, max_size=8).map(sorted), st.integers(0, 2 * 10**6))
def test_every_length_has_exactly_one_stage(boundaries: list[int], length_tokens: int) -> None:
    """Each length is in the range of exactly one stage, which `stage_index_of` returns; boundaries round-trip."""
    groups = tuple((f"i{n}",) for n in range(len(boundaries) + 1))
    layout = StageLayout.from_boundaries(tuple(boundaries), groups)
    holders = [index for index, stage in enumerate(layout.stages) if length_tokens in stage.range]
    assert holders == [layout.stage_index_of(length_tokens)]
    assert layout.boundaries_tokens == tuple(boundaries)
    assert StageLayout.from_boundaries(layout.boundaries_tokens, groups) == layout


def test_instances_know_their_stage() -> None:
    """An instance's stage is found; an unknown instance has none."""
    layout = StageLayout.from_boundaries((5,), (("b", "a"), ("c",)))
    assert [layout.stage_index_of_instance(i) for i in "abcd"] == [0, 0, 1, None]


@pytest.mark.parametrize(
    ("boundaries", "sizes", "message"),
    [
        ((500,), (4,), "no stages"),
        ((), (), "no stages"),
        ((500,), (4, 0), "no stages"),
        ((500, 400), (1, 1, 2), "not strictly increasing"),
        ((0,), (1, 1), "not strictly increasing"),
    ],
)
def test_bad_proposals_are_refused(boundaries: tuple[int, ...], sizes: tuple[int, ...], message: str) -> None:
    """Every stage of a proposal has an instance; boundaries increase, and there is one fewer than stages."""
    with pytest.raises(PlanError, match=message):
        Proposal(boundaries, sizes)


def test_a_proposal_is_dealt_out_in_order() -> None:
    """
    The first instances get the shortest stage; a layout's own proposal reproduces it; other numbers of instances are
    errors.
    """
    layout = Proposal((100, 900), (1, 2, 1)).on(("c", "d", "a", "b"))
    assert [stage.instance_ids for stage in layout.stages] == [("c",), ("a", "d"), ("b",)]
    assert layout.boundaries_tokens == (100, 900)
    assert Proposal.like(layout) == Proposal((100, 900), (1, 2, 1))
    assert Proposal.like(layout).on(("c", "a", "d", "b")) == layout
    with pytest.raises(PlanError, match="for 4 instances, not 3"):
        Proposal((100, 900), (1, 2, 1)).on(("a", "b", "c"))
    with pytest.raises(PlanError, match="in two stages"):
        Proposal((100,), (1, 1)).on(("a", "a"))
