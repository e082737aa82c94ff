"""How slow an instance is beside the others: proportional, insensitive to noise and hiccups, and soon forgotten."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.events import InstanceJoined, InstanceLost, InstanceReport, InstanceReported
from cascadeinfer.core.instance import Pricing
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.pace import IDLE_REPORTS_PER_FADING, REPORTS_KEPT, REPORTS_NEEDED, Costs, Pace, slowness_of
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import ClusterView

CAPACITY = InstanceCapacity(kv_blocks=100, block_size_tokens=10, max_num_seqs=20, max_batched_tokens=512)
PRICES = Pricing(0.01, 0.001, 1e-5, 1e-4, 1e-7)


def step(seconds: float, n_decode: int = 4, prefill_tokens: int = 0) -> StepSample:
    """A step that took this long."""
    return StepSample(BatchFeatures(n_decode, 100 * n_decode, 100, prefill_tokens, 0.0), seconds)


def report(view: ClusterView, instance_id: str, *steps: StepSample) -> None:
    """An instance reports these steps."""
    view.apply(InstanceReported("c", instance_id, InstanceReport((), (), (), (), 0, steps=steps)))


def cluster(*instance_ids: str) -> ClusterView:
    """A view of these instances."""
    view = ClusterView(lambda _: PRICES)
    for instance_id in instance_ids:
        view.apply(InstanceJoined("c", instance_id, InstanceKind(CAPACITY)))
    return view


def slowness(view: ClusterView) -> list[float]:
    """The slowness of each instance, rounded."""
    return [round(instance.slowness, 6) for instance in view.instances.values()]


def test_a_slow_instance_is_dearer_by_as_much() -> None:
    """Ten times the seconds for the same steps mean ten times the price; the others' prices stay."""
    view = cluster("a", "b", "c")
    before = view.instances["a"].price
    for _ in range(REPORTS_NEEDED):
        for instance_id, factor in (("a", 10.0), ("b", 1.0), ("c", 1.0)):
            report(view, instance_id, step(0.02 * factor), step(0.02 * factor))
    assert slowness(view) == [10.0, 1.0, 1.0]
    assert view.instances["a"].price == pytest.approx(10.0 * before)
    assert view.instances["a"].marginal_price(50, 0) == pytest.approx(10.0 * view.instances["b"].marginal_price(50, 0))
    assert view.instances["b"].price == before
    assert view.instances["a"].slowed_load > view.instances["b"].slowed_load == 0.0


def test_the_content_of_steps_is_no_slowness() -> None:
    """Steps that are long because they contain much are as fast as any."""
    view = cluster("a", "b")
    for _ in range(REPORTS_KEPT):
        report(view, "a", step(0.014 + 0.004))
        report(view, "b", step(0.014 + 0.004 + 0.2, prefill_tokens=2000))
    assert slowness(view) == [1.0, 1.0]


def test_a_stopped_instance_takes_most_steps_as_fast_as_ever() -> None:
    """Stopped nine tenths of the time: one step in each report is very long, the others are not."""
    view = cluster("a", "b")
    for _ in range(REPORTS_KEPT):
        report(view, "a", *[step(0.01)] * 9, step(0.91))
        report(view, "b", *[step(0.01)] * 10)
    assert slowness(view) == [10.0, 1.0]


@given(place=st.integers(0, REPORTS_KEPT - 1), seconds=st.floats(0.1, 1e6))
def test_one_hiccup_says_nothing(place: int, seconds: float) -> None:
    """A single report with a step of any length changes no price."""
    view = cluster("a", "b")
    for number in range(REPORTS_KEPT):
        report(view, "a", step(seconds if number == place else 0.02))
        report(view, "b", step(0.02))
        assert slowness(view) == [1.0, 1.0]


@given(seed=st.integers(0, 1000))
def test_noise_changes_no_price(seed: int) -> None:
    """Equal instances differ by a third, step by step: the prices are exactly as without reports."""
    rng = random.Random(seed)
    view = cluster("a", "b", "c")
    prices = [instance.price for instance in view.instances.values()]
    for _ in range(3 * REPORTS_KEPT):
        for instance_id in "abc":
            report(view, instance_id, *[step(0.02 * rng.uniform(0.75, 1.35)) for _ in range(3)])
        assert [instance.price for instance in view.instances.values()] == prices


def test_who_is_fast_again_is_trusted_with_work_again() -> None:
    """After as many reports as are kept, no slowness is left; without work, it fades as well."""
    view = cluster("a", "b")
    for _ in range(REPORTS_KEPT):
        report(view, "a", step(0.2))
        report(view, "b", step(0.02))
    assert slowness(view) == [10.0, 1.0]
    for _ in range(REPORTS_KEPT):
        report(view, "a", step(0.02))
    assert slowness(view) == [1.0, 1.0]
    for _ in range(REPORTS_KEPT):
        report(view, "a", step(0.2))
    for _ in range(REPORTS_KEPT * IDLE_REPORTS_PER_FADING):
        report(view, "a")
    assert slowness(view) == [1.0, 1.0]


@pytest.mark.parametrize("intervals", [1, 7, 10, 10_000])
def test_rare_reports_of_an_idle_instance_fade_as_fast(intervals: int) -> None:
    """A report that stands for several intervals makes as much forgotten as that many reports."""
    often, rarely = Pace(), Pace()
    for pace in (often, rarely):
        for _ in range(REPORTS_KEPT):
            pace.note([step(0.2)])
    for _ in range(20):
        changes = [often.note(()) for _ in range(intervals)]
        assert rarely.note((), intervals) == any(changes)
        assert rarely.cost(PRICES) == often.cost(PRICES)


def test_another_life_begins_unknown() -> None:
    """What was known of an instance ends with its life."""
    view = cluster("a", "b")
    for _ in range(REPORTS_KEPT):
        report(view, "a", step(0.2))
        report(view, "b", step(0.02))
    view.apply(InstanceLost("c", "a"))
    view.apply(InstanceJoined("c", "a", InstanceKind(CAPACITY)))
    report(view, "b", step(0.02))
    assert sorted((i.instance_id, i.slowness) for i in view.instances.values()) == [("a", 1.0), ("b", 1.0)]


def test_another_price_list_is_laid_on_the_same_steps() -> None:
    """Learning other costs does not forget an instance's slowness: the next report shows it again."""
    view = cluster("a", "b")
    for _ in range(REPORTS_KEPT):
        report(view, "a", step(0.2))
        report(view, "b", step(0.02))
    view.reprice(lambda _: Pricing(0.02))
    report(view, "b", step(0.02))
    assert slowness(view) == [10.0, 1.0]


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_nothing_is_divided_by_nothing(seconds: float) -> None:
    """Prices of zero and steps that take no time say nothing."""
    pace = Pace()
    for _ in range(REPORTS_KEPT):
        pace.note((step(seconds, n_decode=0),))
    assert pace.cost(Pricing(0.0)) is None
    assert (pace.cost(PRICES) is None) == (seconds == 0.0)
    assert slowness_of({}, {}) == {}


def test_between_the_limits_the_last_word_holds() -> None:
    """A slow instance stays slow until it clearly is not; another becomes slow once it clearly is."""
    costs = {"a": 1.7, "b": 1.0}
    assert slowness_of(costs, {"a": 1.0}) == {"a": 1.0, "b": 1.0}
    assert slowness_of(costs, {"a": 3.0}) == {"a": 1.7, "b": 1.0}


COST = st.sampled_from([0.4, 0.5, 0.9, 1.0, 1.1, 1.5, 1.7, 2.0, 2.4, 3.5, 4.0])


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.none() | COST), max_size=40))
def test_looking_at_the_slow_ones_only_gives_the_same(notes: list[tuple[str, float | None]]) -> None:
    """After each change, the slow ones among the ranked costs are those that a comparison of all with all finds."""
    ranked = Costs()
    costs: dict[str, float] = {}
    slow: dict[str, float] = {}
    for name, cost in notes:
        ranked.note(name, cost)
        costs.pop(name, None)
        if cost is not None:
            costs[name] = cost
        everyone = slowness_of(costs, slow)
        slow = ranked.slow(slow)
        assert slow == {other: slowness for other, slowness in everyone.items() if slowness > 1.0}
        assert ranked.among("abcdefgh") == costs
    ranked.clear()
    assert ranked.slow(slow) == {}


def test_a_kind_that_is_slow_as_a_whole_lags_behind_nobody() -> None:
    """An instance lags when it is slow for its step model; a slow kind costs more, but its steps are learned from."""
    view = ClusterView(lambda _: PRICES)
    for instance_id, key in (("a", ""), ("b", ""), ("c", ""), ("d", "slow"), ("e", "slow"), ("f", "")):
        view.apply(InstanceJoined("c", instance_id, InstanceKind(CAPACITY, key)))
    for _ in range(REPORTS_NEEDED):
        for instance_id, factor in (("a", 1.0), ("b", 1.0), ("c", 5.0), ("d", 3.0), ("e", 3.0), ("f", 1.0)):
            report(view, instance_id, step(0.02 * factor))
    assert slowness(view) == [1.0, 1.0, 5.0, 3.0, 3.0, 1.0]
    assert [round(instance.lag, 6) for instance in view.instances.values()] == [1.0, 1.0, 5.0, 1.0, 1.0, 1.0]
