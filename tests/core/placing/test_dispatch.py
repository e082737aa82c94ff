"""Filter, score, pick: room first, then load or price, ties by order."""

from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Dispatch
from cascadeinfer.core.events import InstanceDraining, InstanceJoined, RequestArrived
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.placing.dispatch import (
    Chosen,
    cheapest,
    cheapest_with_room,
    has_room,
    least_loaded,
    pick,
    pricing_of,
)
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import ClusterView

CAPACITY = InstanceCapacity(kv_blocks=100, block_size_tokens=10, max_num_seqs=4, max_batched_tokens=512)
MODEL = StepModel(
    base_s=0.01, per_decode_s=1e-4, per_kv_token_s=1e-6, per_prefill_token_s=5e-5, per_prefill_attention_s=0.0
)


def cluster(loads: dict[str, list[int]]) -> ClusterView:
    """Instances with requests of these lengths."""
    view = ClusterView(lambda kind: pricing_of(MODEL, kind.capacity))
    for instance_id in loads:
        view.apply(InstanceJoined("c", instance_id, InstanceKind(CAPACITY)))
    for instance_id, lengths in loads.items():
        for number, tokens in enumerate(lengths):
            view.apply(RequestArrived("c", f"{instance_id}.{number}", tokens, 100))
            view.carry_out([Dispatch("c", f"{instance_id}.{number}", instance_id)])
    return view


def name(chosen: Chosen | None) -> str | None:
    """The id of the instance picked."""
    return None if chosen is None else chosen.instance.instance_id


def test_load_is_the_larger_share() -> None:
    """300 of 1,000 tokens and 2 of 4 requests make a load of 0.5."""
    assert cluster({"a": [100, 200]}).instances["a"].load == 0.5
    assert cluster({"a": [600, 200]}).instances["a"].load == 0.8


def test_least_loaded_and_ties() -> None:
    """The lowest load wins; among equals the first in order of id."""
    view = cluster({"a": [500], "b": [300], "c": [300]})
    assert name(least_loaded(view.available())) == "b"
    assert least_loaded([]) is None
    assert cheapest([]) is None


def test_room_needs_blocks_one_more_and_a_slot() -> None:
    """A request fits if there are its blocks, one more, and a slot in the batch."""
    a = cluster({"a": [500]}).instances["a"]
    assert has_room(a, 490)
    assert not has_room(a, 491)
    assert not has_room(cluster({"a": [1, 1, 1, 1]}).instances["a"], 1)


def test_pick_passes_over_who_has_no_room() -> None:
    """The least loaded instance is skipped if the request does not fit there; if it fits nowhere, it queues there."""
    view = cluster({"a": [200, 200, 200], "b": [100, 100, 100, 100]})
    assert name(least_loaded(view.available())) == "a"
    assert name(pick(view.available(), 300)) == "a"
    assert name(pick(view.available(), 900)) == "a"
    view = cluster({"a": [1, 1, 1, 1], "b": [999], "c": [990]})
    assert name(pick(view.available(), 5)) == "c"
    assert pick([], 5) is None


def test_pick_leaves_the_draining_out() -> None:
    """A draining instance is never picked, even if it is the only one with room."""
    view = cluster({"a": [], "b": [1, 1, 1, 1]})
    everyone = list(view.available())
    view.apply(InstanceDraining("c", "a"))
    assert name(pick(everyone, 5)) == "b"


def test_price_counts_what_a_step_costs_everybody() -> None:
    """Of two instances with equal tokens, the one with fewer requests is cheaper, although their loads are equal."""
    view = cluster({"a": [290, 290], "b": [580]})
    assert name(least_loaded(view.available())) == "a"
    assert name(cheapest(view.available())) == "b"
    b = view.instances["b"]
    queued_s = 580 * 5e-5 / 128
    assert abs(b.price - 2 * (0.01 + 1e-4 + 580 * 1e-6 + queued_s)) < 1e-12


def test_crowded_instances_are_dear() -> None:
    """Beyond 60 % of the KV cache the price rises, fivefold when full."""
    view = cluster({"a": [1000], "b": [590]})
    plain = 2 * (0.01 + 1e-4 + 1000 * 1e-6 + 1000 * 5e-5 / 128)
    assert abs(view.instances["a"].price - 5.0 * plain) < 1e-12


def test_cheapest_with_room_passes_over() -> None:
    """The cheapest instance with room, or none."""
    view = cluster({"a": [590], "b": [200, 200]})
    assert name(cheapest(view.available())) == "a"
    assert name(cheapest_with_room(view.available(), 500)) == "b"
    assert cheapest_with_room(view.available(), 700) is None


def test_without_a_model_prices_follow_proportions() -> None:
    """Nominal prices make a full cache weigh as much as two empty steps."""
    nominal = pricing_of(None, CAPACITY)
    assert nominal.per_token * CAPACITY.kv_tokens == 2.0 * nominal.base


@given(loads=st.lists(st.lists(st.integers(1, 400), max_size=4), min_size=1, max_size=6), tokens=st.integers(1, 900))
def test_pick_is_the_best_by_definition(loads: list[list[int]], tokens: int) -> None:
    """The short cut picks the same instance as filtering all and taking the minimum."""
    view = cluster({f"i{n}": lengths for n, lengths in enumerate(loads)})
    everyone = list(view.available())
    fitting = [i for i in everyone if has_room(i, tokens)]
    by_load = min(fitting or everyone, key=lambda i: (i.load, i.instance_id))
    assert name(pick(everyone, tokens)) == by_load.instance_id
    by_price = min(fitting, key=lambda i: (i.price, i.instance_id), default=None)
    assert name(cheapest_with_room(everyone, tokens)) == (None if by_price is None else by_price.instance_id)
