"""Which requests have outgrown their range, and which of them may move."""

import pytest

from cascadeinfer.core.bidask.handover import HandoverRules, may_move, movable, outgrown
from cascadeinfer.core.effects import Dispatch, MigrationReason, StartMigration
from cascadeinfer.core.events import InstanceJoined, InstanceReport, InstanceReported, PinReason, RequestArrived
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceCapacity
from cascadeinfer.core.view import ClusterView

CAPACITY = InstanceCapacity(kv_blocks=1000, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=512)
RULES = HandoverRules(margin_share=0.1, margin_tokens=16, min_remaining_tokens=10)


def instance_with(*requests: tuple[str, int, int, int]) -> ClusterView:
    """One instance that has reported these (id, prompt, cap of output, length) as running."""
    view = ClusterView()
    view.apply(InstanceJoined("c", "a", InstanceKind(CAPACITY)))
    for request_id, prompt, cap, _ in requests:
        pin = PinReason.LORA if request_id == "pinned" else None
        view.apply(RequestArrived("c", request_id, prompt, cap, (), pin))
        view.carry_out([Dispatch("c", request_id, "a")])
    ids = tuple(r[0] for r in requests if r[0] != "waits")
    report = InstanceReport(ids, tuple(r[3] for r in requests if r[0] != "waits"), (), (), 10)
    view.apply(InstanceReported("c", "a", report))
    return view


def test_threshold_is_the_larger_margin() -> None:
    """The threshold is 16 tokens near the start, a tenth further up, and absent for the last stage."""
    assert RULES.threshold_tokens(100) == 116
    assert RULES.threshold_tokens(1000) == 1100
    assert RULES.threshold_tokens(UNBOUNDED_TOKENS) == UNBOUNDED_TOKENS


def test_outgrown_longest_first() -> None:
    """Requests beyond the margin, the longest first, and the earlier arrival among equals."""
    view = instance_with(("in", 90, 500, 115), ("c", 90, 500, 116), ("b", 90, 500, 300), ("d", 90, 500, 116))
    found = outgrown(view.instances["a"], 100, view.requests, RULES)
    assert [request.request_id for request in found] == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("request_id", "prompt", "cap", "tokens", "may"),
    [
        ("plain", 90, 500, 200, True),
        ("pinned", 90, 500, 200, False),
        ("waits", 90, 500, 90, False),
        ("prefilling", 200, 500, 200, False),
        ("ending", 90, 119, 200, False),
        ("nearly ending", 90, 120, 200, True),
    ],
)
def test_what_may_move(request_id: str, prompt: int, cap: int, tokens: int, *, may: bool) -> None:
    """A request may move if it decodes, is not pinned, and has enough tokens ahead of it."""
    view = instance_with((request_id, prompt, cap, tokens))
    a = view.instances["a"]
    assert may_move(view.requests[request_id], a, RULES) is may
    assert [r.request_id for r in movable(a, view.requests, RULES)] == ([request_id] if may else [])
    assert bool(outgrown(a, 80, view.requests, RULES)) is may


def test_what_moves_already_may_not_move() -> None:
    """A request in a migration is left alone."""
    view = instance_with(("r", 90, 500, 200))
    view.apply(InstanceJoined("c", "b", InstanceKind(CAPACITY)))
    view.carry_out([StartMigration("c", "m", "r", "a", "b", MigrationReason.DRAIN)])
    assert not movable(view.instances["a"], view.requests, RULES)


def test_empty_instance_has_outgrown_nothing() -> None:
    """Without requests, none is found."""
    view = instance_with()
    assert outgrown(view.instances["a"], 10, view.requests, RULES) == []
