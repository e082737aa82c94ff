"""The view's books: loads, room and lengths are right after every event, even if events cross."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.effects import Dispatch, MigrationReason, Reject, StartMigration
from cascadeinfer.core.events import (
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    MigrationEnded,
    MigrationOutcome,
    RequestArrived,
    RequestFinished,
)
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import ClusterView, InstanceView, Pricing

CAPACITY = InstanceCapacity(kv_blocks=100, block_size_tokens=10, max_num_seqs=20, max_batched_tokens=512)


def books(*instance_ids: str) -> ClusterView:
    """A view with these instances."""
    view = ClusterView(lambda _: Pricing(1.0, 0.1, 0.01, 0.002, 0.0, 0.5))
    for instance_id in instance_ids:
        view.apply(InstanceJoined("c", instance_id, InstanceKind(CAPACITY)))
    return view


def arrive(view: ClusterView, request_id: str, tokens: int, instance_id: str | None = None) -> None:
    """A request arrives, and is dispatched if an instance is named."""
    view.apply(RequestArrived("c", request_id, tokens, 100))
    if instance_id is not None:
        view.carry_out([Dispatch("c", request_id, instance_id)])


def report(view: ClusterView, instance_id: str, running: dict[str, int], waiting: dict[str, int], used: int) -> None:
    """An instance reports."""
    lists = (tuple(running), tuple(running.values()), tuple(waiting), tuple(waiting.values()))
    view.apply(InstanceReported("c", instance_id, InstanceReport(*lists, used, 0.02)))


def check(view: ClusterView) -> None:
    """The sums that are kept equal those that can be counted."""
    for instance in view.instances.values():
        assert instance.kv_tokens == sum(instance.request_ids.values())
        assert instance.inbound_tokens == sum(instance.inbound.values())
        assert set(instance.waiting) <= set(instance.request_ids)
        assert set(instance.waiting) <= set(instance.starting) <= set(instance.request_ids)
        assert abs(instance.queue - 0.002 * sum(instance.starting.values())) < 1e-9
        tokens = instance.kv_tokens + instance.inbound_tokens
        n = len(instance.request_ids) + len(instance.inbound)
        assert abs(instance.load - max(tokens / 1000, n / 20)) < 1e-12
        step = 1.0 + 0.1 * n + 0.01 * tokens + 0.5 * instance.queue
        crowding = 1.0 + 4.0 * (max(0.0, tokens / 1000 - 0.6) / 0.4) ** 2
        assert abs(instance.price - (n + 1) * step * crowding) < 1e-9 * instance.price
        for request_id in instance.request_ids:
            assert view.requests[request_id].place is instance
    placed = {r for instance in view.instances.values() for r in instance.request_ids}
    assert [r.request_id for r in view.unplaced()] == [r for r in view.requests if r not in placed]
    assert view.waits() == len(view.unplaced())


def test_dispatch_counts_at_once() -> None:
    """A dispatched request counts on its instance before any report."""
    view = books("a")
    arrive(view, "r", 95, "a")
    a = view.instances["a"]
    assert (a.kv_tokens, a.starting, a.committed_requests) == (95, {"r": 95}, 1)
    assert a.free_blocks() == 90
    assert view.requests["r"].instance_id == "a"
    check(view)


def test_report_replaces_lengths_and_leaves_strangers_out() -> None:
    """A report updates lengths; requests in it that are gone (a finish crossed it) stay out of the books."""
    view = books("a", "b")
    arrive(view, "r", 95, "a")
    arrive(view, "s", 20, "b")
    report(view, "a", {"r": 101, "s": 30, "gone": 400}, {"gone too": 50}, 60)
    a = view.instances["a"]
    assert dict(a.request_ids) == {"r": 101}
    assert view.requests["r"].tokens == 101
    assert view.requests["s"].tokens == 20
    assert a.free_blocks() == 40
    assert not a.waiting
    check(view)


def test_blocks_between_reports() -> None:
    """Room follows changes since the report: a newcomer's blocks are taken, those of a finished request are free."""
    view = books("a")
    arrive(view, "r", 95, "a")
    report(view, "a", {"r": 100}, {}, 12)  # two blocks more than its length: shared, pinned or reserved
    arrive(view, "s", 41, "a")
    a = view.instances["a"]
    assert a.free_blocks() == 100 - 12 - 5
    view.apply(RequestFinished("c", "r", 5))
    assert a.free_blocks() == 100 - 2 - 5
    report(view, "a", {}, {"s": 41}, 0)
    assert a.free_blocks() == 95
    check(view)


def test_preempted_request_waits_again() -> None:
    """A request that the report lists as waiting is waiting, even if it ran before."""
    view = books("a")
    arrive(view, "r", 30, "a")
    report(view, "a", {"r": 31}, {}, 4)
    assert not view.instances["a"].waiting
    report(view, "a", {}, {"r": 35}, 0)
    assert list(view.instances["a"].waiting) == ["r"]
    check(view)


def test_a_prompt_under_way_still_counts_as_queued() -> None:
    """A request that runs without a new token is being computed until its next token; so again after preemption."""
    view = books("a")
    arrive(view, "r", 30, "a")
    a = view.instances["a"]
    report(view, "a", {"r": 30}, {}, 4)
    assert (a.starting, a.waiting) == ({"r": 30}, {})
    report(view, "a", {"r": 31}, {}, 4)
    assert (a.starting, a.queue) == ({}, 0.0)
    report(view, "a", {}, {"r": 44}, 0)
    assert a.starting == {"r": 44}
    check(view)


def test_urgency_changes_prices() -> None:
    """The weight of the wait for the first token may follow the workload."""
    view = books("a")
    arrive(view, "r", 100, "a")
    before = view.instances["a"].price
    view.set_urgency(1.0)
    report(view, "a", {"r": 100}, {}, 10)
    assert abs(view.instances["a"].price - before - 2 * 0.5 * 0.2) < 1e-9


def test_migration_counts_at_both_ends() -> None:
    """A moving request counts at its source and is expected at its target until the migration is over."""
    view = books("a", "b")
    arrive(view, "r", 50, "a")
    view.carry_out([StartMigration("c", "m", "r", "a", "b", MigrationReason.REBALANCE)])
    a, b = view.instances["a"], view.instances["b"]
    assert (a.migrations, b.migrations, b.committed_kv_tokens, b.committed_requests) == (1, 1, 50, 1)
    check(view)
    view.apply(MigrationEnded("c", "m", "r", "a", "b", MigrationOutcome.MOVED))
    assert (a.migrations, b.migrations, a.kv_tokens, b.kv_tokens) == (0, 0, 0, 50)
    assert not b.waiting
    check(view)


def test_end_of_another_migration_changes_nothing() -> None:
    """The end of a migration that the request is not in leaves it where it is."""
    view = books("a", "b")
    arrive(view, "r", 50, "a")
    view.apply(MigrationEnded("c", "old", "r", "a", "b", MigrationOutcome.MOVED))
    assert view.requests["r"].instance_id == "a"
    check(view)


def test_loss_makes_orphans_with_their_lengths() -> None:
    """Requests of a lost instance, and those that the event names, are unplaced, with the lengths it gives."""
    view = books("a", "b")
    arrive(view, "r", 50, "a")
    arrive(view, "s", 60, "b")
    view.apply(InstanceLost("c", "a", ("r", "s"), (58, 66)))
    assert [(r.request_id, r.tokens) for r in view.unplaced()] == [("r", 58), ("s", 66)]
    assert list(view.instances) == ["b"]
    check(view)


def test_available_is_sorted_and_without_the_draining() -> None:
    """Instances that take requests come in order of id, whenever they joined."""
    view = books("c", "a", "b")
    view.apply(InstanceDraining("c", "b"))
    assert [i.instance_id for i in view.available()] == ["a", "c"]


def test_refused_request_is_forgotten() -> None:
    """A Reject removes the request from the books."""
    view = books("a")
    arrive(view, "r", 50)
    view.carry_out([Reject("c", "r", "queue_full", 1.0)])
    assert not view.requests
    check(view)


def test_unplaced_in_order_of_arrival() -> None:
    """An orphan that arrived earlier comes before requests that have waited since."""
    view = books("a")
    arrive(view, "old", 10, "a")
    arrive(view, "new", 10)
    view.apply(InstanceLost("c", "a", ("old",), (12,)))
    assert [r.request_id for r in view.unplaced()] == ["old", "new"]


step = st.tuples(st.integers(0, 7), st.integers(0, 99), st.integers(0, 99))


@given(steps=st.lists(step, max_size=60))
def test_books_balance(steps: list[tuple[int, int, int]]) -> None:
    """After any sequence of events, legal or crossing, the kept sums equal the counted ones."""
    view = books("a", "b")
    names = [f"r{number}" for number in range(8)]
    for kind, a, b in steps:
        name, here, there = names[a % 8], "ab"[b % 2], "ba"[b % 2]
        known = view.requests.get(name)
        if kind == 0 and known is None:
            arrive(view, name, 1 + a, here)
        elif kind == 1:
            view.apply(RequestFinished("c", name, b))
        elif kind == 2:
            half = b % 9
            lengths = dict.fromkeys(names, 5 + a)
            waiting = {r: lengths.pop(r) for r in names[half:]}
            report(view, here, lengths, waiting, a)
        elif kind == 3 and known is not None and known.place is not None and known.migration_id is None:
            source = known.place.instance_id
            view.carry_out([StartMigration("c", f"m{name}", name, source, there, MigrationReason.DRAIN)])
        elif kind == 4:
            outcome = list(MigrationOutcome)[a % 5]
            view.apply(MigrationEnded("c", f"m{name}", name, here, there, outcome))
        elif kind == 5 and len(view.instances) > 1:
            view.apply(InstanceLost("c", here, (name,), (b,)))
        elif kind == 6 and here not in view.instances:
            view.apply(InstanceJoined("c", here, InstanceKind(CAPACITY)))
        elif kind == 7 and known is not None and known.place is None and here in view.instances:
            view.carry_out([Dispatch("c", name, here)])
        check(view)


def test_foreign_requests_are_load() -> None:
    """Requests of other front-end processes count in load, price, room and queue like ours, but remain unknown."""
    foreign, own = books("a"), books("a")
    view = InstanceReport((), (), (), (), 30, 0.02, foreign_running_tokens=(100, 140), foreign_waiting_tokens=(50,))
    foreign.apply(InstanceReported("c", "a", view))
    for name, tokens in (("x", 100), ("y", 140), ("z", 50)):
        arrive(own, name, tokens, "a")
    report(own, "a", {"x": 101, "y": 141}, {"z": 50}, 30)
    report(own, "a", {"x": 100, "y": 140}, {"z": 50}, 30)
    seen, like = foreign.instances["a"], own.instances["a"]
    assert (seen.load, seen.price) == (like.load, like.price)
    assert seen.free_blocks() == like.free_blocks() == 100 - 30 - 5
    for one in (foreign, own):
        one.reprice(lambda _: Pricing(base=0.01, per_token=1e-6, per_queued_token=1e-4, urgency=0.1))
    assert seen.price == like.price
    assert seen.queue == 0.0 < seen.foreign_queue == like.queue
    assert seen.committed_requests == 3
    assert seen.committed_kv_tokens == 290
    assert not seen.request_ids
    assert not foreign.requests
    report(foreign, "a", {}, {}, 0)
    assert (seen.load, seen.committed_requests, seen.free_blocks()) == (0.0, 0, 100)


def test_views_compare_by_identity() -> None:
    """Two instances with equal numbers are two instances."""
    assert InstanceView("a", InstanceKind(CAPACITY)) != InstanceView("a", InstanceKind(CAPACITY))


def kinds_view() -> ClusterView:
    """One instance of 1,000 tokens and one of 500."""
    view = ClusterView(lambda kind: Pricing(1.0, 0.0, 1.0 / kind.capacity.kv_tokens))
    half = replace(CAPACITY, kv_blocks=CAPACITY.kv_blocks // 2)
    view.apply(InstanceJoined("c", "a", InstanceKind(CAPACITY)))
    view.apply(InstanceJoined("c", "b", InstanceKind(half, "slow")))
    return view


def test_who_could_hold_a_request() -> None:
    """The cap counts, not the length now; one beyond all caches counts as the largest, also while that one is away."""
    view = kinds_view()
    most = CAPACITY.kv_tokens
    everybody = view.available()
    for number, (prompt, cap, able) in enumerate(
        [(1, most // 2 - 1, "ab"), (1, most // 2, "a"), (1, most - 1, "a"), (most // 2, 10 * most, "a")]
    ):
        view.apply(RequestArrived("c", f"r{number}", prompt, cap))
        request = view.requests[f"r{number}"]
        assert "".join(i.instance_id for i in view.able(request, everybody)) == able
        assert "".join(view.able_ids(request, ("a", "b"))) == able
    view.apply(InstanceLost("c", "a"))
    assert list(view.able(view.requests["r3"], view.available())) == []
    assert [i.instance_id for i in view.able(view.requests["r0"], view.available())] == ["b"]


def test_each_kind_has_its_own_prices() -> None:
    """Prices follow from an instance's own kind; a kind that joins late weighs first-token waits like all others."""
    view = kinds_view()
    one, other = view.instances["a"].pricing, view.instances["b"].pricing
    assert other.per_token == pytest.approx(2.0 * one.per_token)
    view.set_urgency(0.25)
    view.apply(InstanceJoined("c", "late", InstanceKind(CAPACITY, "new")))
    assert view.instances["late"].pricing.urgency == 0.25


def versions() -> ClusterView:
    """`a` and `b` run one version of the model, `b` with another form of KV cache; `c` runs the next version."""
    view = ClusterView()
    for instance_id, version, group in (("a", "", ""), ("b", "", "other"), ("c", "next", "next")):
        kind = InstanceKind(CAPACITY, model_version=version, kv_group=group)
        view.apply(InstanceJoined("c", instance_id, kind))
    return view


def able(view: ClusterView, request_id: str) -> str:
    """The instances that may take a request."""
    request = view.requests[request_id]
    found = "".join(instance.instance_id for instance in view.able(request, view.available()))
    assert "".join(view.able_ids(request, ("a", "b", "c"))) == found
    return found


def test_a_request_with_output_stays_with_its_version() -> None:
    """
    Without output it may go anywhere; with output it moves where its KV cache can go, and is dispatched anew only to
    its version, which the loss of its instance tells even where no report has.
    """
    view = versions()
    for request_id in ("r", "s", "t"):
        arrive(view, request_id, 100, "a")
        assert able(view, request_id) == "a", "it is placed: its KV cache can go nowhere else"
    arrive(view, "u", 100)
    assert able(view, "u") == "abc"
    report(view, "a", {"r": 105, "s": 100}, {"t": 100}, 30)
    view.apply(InstanceLost("c", "a", ("r", "s", "t"), (106, 101, 100)))
    assert (able(view, "r"), able(view, "s"), able(view, "t")) == ("b", "b", "bc")
    view.carry_out([Dispatch("c", "t", "c")])
    report(view, "c", {"t": 101}, {}, 11)
    view.apply(InstanceLost("c", "c", ("t",), (101,)))
    assert able(view, "t") == ""


def test_one_version_is_no_bound() -> None:
    """Once only one is left, the same sequence is returned for a request of whatever length it can hold."""
    view = versions()
    arrive(view, "r", 100)
    for gone in ("b", "c"):
        assert view.able(view.requests["r"], view.available()) is not view.available()
        view.apply(InstanceLost("c", gone))
    assert view.able(view.requests["r"], view.available()) is view.available()
