"""
Which instance takes a request: filter, score, pick.

Formula: the least loaded of the candidates that have room; if none has room, the least loaded of all (its engine queues
the request, as vLLM does). Ties go to the first candidate; callers pass them sorted by id. Load is `max(kv tokens /
capacity, requests / max_num_seqs)` (`InstanceView.load`) and counts inbound migrations, so that two migrations do not
both see the same free place. An instance whose steps take longer than its peers' (`core/pace.py`) counts as
proportionally fuller (`InstanceView.slowed_load`). A suspected instance has no room while another is not suspected.

*Price* is the finer measure: the total of seconds that all requests of an instance and the newcomer wait per token
(`Pricing`). Among rules that know no output length it gave the lowest mean latency in simulation on every trace and
load tried: by 4 to 6 % against KV tokens at high load, 1 to 5 % against request counts, 0 to 2 % against Llumnix'
freeness. Source of the filter-score-pick split: llm-d's scheduler.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Final

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import InstanceView, Pricing

_load = attrgetter("slowed_load")
_price = attrgetter("price")

TYPICAL_OUTPUT_TOKENS: Final = 128
"""Tokens over which a newcomer's wait for its first is amortised until the workload is known; the harmonic mean of
output lengths is 10 to 500 in traces.
"""
NOMINAL_KV_SHARE: Final = 2.0
"""Reading a full KV cache relative to an empty step: 30 to 120 GB of cache, 15 to 140 GB of weights."""
NOMINAL_PREFILL_SHARE: Final = 0.005
"""Computing one prompt token relative to the same: bytes/s over FLOP/s of today's devices (H100: 3.35e12 / 6e14)."""


def pricing_of(model: StepModel | None, capacity: InstanceCapacity) -> Pricing:
    """Step costs from a cost model; without one, nominal proportions."""
    if model is None:
        return Pricing(
            base=1.0,
            per_token=NOMINAL_KV_SHARE / capacity.kv_tokens,
            per_queued_token=NOMINAL_PREFILL_SHARE,
            urgency=1.0 / TYPICAL_OUTPUT_TOKENS,
        )
    return Pricing(
        base=model.base_s,
        per_request=model.per_decode_s,
        per_token=model.per_kv_token_s,
        per_queued_token=model.compute_per_prefill_token_s,
        per_queued_pair=model.per_prefill_attention_s / 2.0,
        urgency=1.0 / TYPICAL_OUTPUT_TOKENS,
    )


def has_room(instance: InstanceView, length_tokens: int) -> bool:
    """Whether a request of this length could run at once: enough blocks (one more than it fills) and a batch slot."""
    capacity = instance.capacity
    return (
        not instance.draining
        and not instance.shunned
        and instance.committed_requests < capacity.max_num_seqs
        and instance.free_blocks() >= capacity.blocks_for(length_tokens) + 1
    )


def least_loaded(candidates: Iterable[InstanceView]) -> InstanceView | None:
    """The candidate with the lowest load, the first among equals; None when there is none."""
    return min(candidates, key=_load, default=None)


def cheapest_with_room(candidates: Sequence[InstanceView], length_tokens: int) -> InstanceView | None:
    """The instance with the lowest price on which a request of this length could run at once, or None."""
    best = cheapest(candidates)
    if best is None or has_room(best, length_tokens):
        return best
    return cheapest([instance for instance in candidates if has_room(instance, length_tokens)])


def nearest_with_room(stages: Sequence[Sequence[InstanceView]], home: int, length_tokens: int) -> InstanceView | None:
    """The cheapest instance with room in this stage, or in the nearest one that has any, the longer one first."""
    for distance in range(len(stages)):
        for index in (home + distance, home - distance)[: 2 if distance else 1]:
            if 0 <= index < len(stages):
                chosen = cheapest_with_room(stages[index], length_tokens)
                if chosen is not None:
                    return chosen
    return None


def cheapest(candidates: Iterable[InstanceView]) -> InstanceView | None:
    """The candidate with the lowest price (`Pricing`), the first among equals; None when there is none."""
    return min(candidates, key=_price, default=None)


def pick(candidates: Sequence[InstanceView], length_tokens: int) -> InstanceView | None:
    """The instance that takes a request of this length, or None without candidates."""
    best = least_loaded(candidates)
    if best is None or has_room(best, length_tokens):
        return best
    with_room = [instance for instance in candidates if has_room(instance, length_tokens)]
    return least_loaded(
        with_room or [instance for instance in candidates if not (instance.draining or instance.shunned)]
    )
