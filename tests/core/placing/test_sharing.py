"""Where a request goes when prompts queue in its stage: thresholds, candidates, choice."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Dispatch
from cascadeinfer.core.events import InstanceJoined, RequestArrived
from cascadeinfer.core.instance import InstanceView
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.placing.dispatch import has_room, pricing_of
from cascadeinfer.core.placing.sharing import RELIEF, RELIEF_BELOW, SHORT, relief_for
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import ClusterView

CAPACITY = InstanceCapacity(kv_blocks=2000, block_size_tokens=10, max_num_seqs=20, max_batched_tokens=1000)
MODEL = StepModel(
    base_s=0.005, per_decode_s=1e-4, per_kv_token_s=1e-6, per_prefill_token_s=5e-5, per_prefill_attention_s=0.0
)
"""A full step computes 1,000 tokens, in 0.05 s."""

Queues = list[dict[str, list[int]]]
"""For each stage, its instances with the prompts that wait there."""


def stages_of(
    queues: Queues, *, model: StepModel | None = MODEL, capacity: InstanceCapacity = CAPACITY
) -> list[list[InstanceView]]:
    """Instances with these prompts, none of which is computed yet."""
    view = ClusterView(lambda kind: pricing_of(model, kind.capacity))
    for stage in queues:
        for instance_id, prompts in stage.items():
            view.apply(InstanceJoined("c", instance_id, InstanceKind(capacity)))
            for number, tokens in enumerate(prompts):
                view.apply(RequestArrived("c", f"{instance_id}.{number}", tokens, 100))
                view.carry_out([Dispatch("c", f"{instance_id}.{number}", instance_id)])
    return [[view.instances[instance_id] for instance_id in stage] for stage in queues]


def chosen(queues: Queues, tokens: int = 100, **options: object) -> str | None:
    """Which instance relieves the first one of the stage named `home`."""
    stages = stages_of(queues, **options)  # type: ignore[arg-type]
    home = next(i for members in stages for i in members if i.instance_id == "home")
    relief = relief_for(home, tokens, stages)
    return None if relief is None else relief.instance.instance_id


def test_up_to_a_full_step_nothing_is_a_backlog() -> None:
    """1,000 tokens fit one step; one more do not."""
    assert chosen([{"home": [1000]}, {"b": []}]) is None
    assert chosen([{"home": [1001]}, {"b": []}]) == "b"


def test_the_threshold_is_the_steps_own() -> None:
    """With twice the token budget it takes twice the queue; slower prompts change nothing, as steps are slower too."""
    queues: Queues = [{"home": [1500]}, {"b": []}]
    assert chosen(queues) == "b"
    assert chosen(queues, capacity=replace(CAPACITY, max_batched_tokens=2000)) is None
    slow = replace(MODEL, per_prefill_token_s=1.0)
    assert chosen(queues, model=slow) == "b"
    assert chosen([{"home": [1000]}, {"b": []}], model=slow) is None


def test_without_a_model_proportions_decide() -> None:
    """Eight nominal steps are the cost of 1,600 prompt tokens, more than the 1,000 of the budget."""
    assert chosen([{"home": [1600]}, {"b": []}], model=None) is None
    assert chosen([{"home": [1601]}, {"b": []}], model=None) == "b"


def test_a_small_budget_makes_no_backlog() -> None:
    """With 100 tokens a step, 0.04 s or eight empty steps decide instead: 800 tokens."""
    small = replace(CAPACITY, max_batched_tokens=100)
    assert chosen([{"home": [800]}, {"b": []}], capacity=small) is None
    assert chosen([{"home": [801]}, {"b": []}], capacity=small) == "b"
    assert chosen([{"home": [900]}, {"b": [501]}], capacity=small) is None
    assert chosen([{"home": [900]}, {"b": [500]}], capacity=small) == "b"


def test_it_has_to_start_sooner_by_half_a_step() -> None:
    """Of a queue of 2,000 tokens, 1,500 elsewhere are little enough, 1,501 are not."""
    assert chosen([{"home": [2000]}, {"b": [1500]}]) == "b"
    assert chosen([{"home": [2000]}, {"b": [1501]}]) is None
    assert RELIEF == 0.5


def test_a_stage_of_shorter_requests_pays_for_longer_queues_only() -> None:
    """The other instance of the stage helps at once, the shorter stage from four steps on."""
    assert chosen([{"short": []}, {"home": [3999]}]) is None
    assert chosen([{"short": []}, {"home": [4000]}]) == "short"
    assert chosen([{"short": []}, {"home": [1500], "beside": []}]) == "beside"
    assert RELIEF_BELOW == 4.0


def test_the_lowest_marginal_price_wins() -> None:
    """Among those that relieve enough, the one where the newcomer costs least, not the one with the shortest queue."""
    crowded = [10] * 15
    assert chosen([{"home": [3000]}, {"busy": crowded, "calm": [300]}]) == "calm"
    assert chosen([{"home": [3000]}, {"a": [200], "b": [100], "c": [100]}]) == "b"


def test_who_has_no_room_does_not_help() -> None:
    """Full instances are passed over; if all are, the request stays at home."""
    full = [1] * 20
    assert chosen([{"home": [3000]}, {"full": full, "b": [500]}]) == "b"
    assert chosen([{"home": [3000]}, {"full": full}]) is None


def test_a_slow_instance_has_a_longer_queue() -> None:
    """Three times as slow, 500 queued tokens are a backlog of 1,500, and 700 elsewhere relieve nobody."""
    stages = stages_of([{"home": [500], "beside": [700]}])
    [[home, beside]] = stages
    assert relief_for(home, 100, stages) is None
    home.set_slowness(3.0)
    relief = relief_for(home, 100, stages)
    assert relief is not None
    assert relief.instance is beside
    beside.set_slowness(3.0)
    assert relief_for(home, 100, stages) is None


prompts = st.lists(st.integers(1, 3000), max_size=4)


@given(queues=st.lists(st.lists(prompts, min_size=1, max_size=3), min_size=1, max_size=4), data=st.data())
@pytest.mark.parametrize("model", [MODEL, None])
def test_relief_is_what_the_rule_says(queues: list[list[list[int]]], data: st.DataObject, model: StepModel) -> None:
    """Against the definition: no relief without a backlog; otherwise the cheapest of all that start soon enough."""
    named = [{f"s{s}i{i}": there for i, there in enumerate(stage)} for s, stage in enumerate(queues)]
    stages = stages_of(named, model=model)
    at = data.draw(st.integers(0, len(stages) - 1))
    home, tokens = stages[at][0], data.draw(st.integers(1, 3000))
    unit = max(home.pricing.per_queued_token * CAPACITY.max_batched_tokens, SHORT * home.pricing.base)
    relief = relief_for(home, tokens, stages)
    if home.queue <= unit:
        assert relief is None
        return
    able = [
        (instance.marginal_price(tokens, 0), instance.instance_id)
        for index, members in enumerate(stages)
        for instance in members
        if home.queue - instance.queue >= (RELIEF if index >= at else RELIEF_BELOW) * unit - 1e-12
        and has_room(instance, tokens)
    ]
    assert (None if relief is None else relief.instance.instance_id) == min(able, default=(0.0, None))[1]
