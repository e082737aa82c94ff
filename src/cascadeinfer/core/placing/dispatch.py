"""
Which instance takes a request: filter, score, pick.

Formula: among the candidates that have room, the least loaded; when none has room, the least loaded of all (its engine
queues the request, which is what vLLM does). Ties go to the first candidate; callers pass them sorted by id. Load is
`max(kv tokens / capacity, requests / max_num_seqs)` (`InstanceView.load`), requests on their way by migration counted,
so two movers do not see the same free place. An instance whose steps take longer than its peers' (`core/pace.py`)
counts as fuller by as much (`InstanceView.slowed_load`). One that is suspected has no room while another is not.

*Price* is the finer measure: the seconds that all requests of an instance and the newcomer wait for one token
(`Pricing`). Among rules that know no output length it gave the lowest mean latency in simulation on every trace and
load tried: against KV tokens 4 to 6 % at high load, against request counts 1 to 5 %, against Llumnix' freeness 0 to 2
%. Source of the filter-score-pick split: llm-d's scheduler.
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
"""Over so many tokens a newcomer spreads the wait for its first, until the workload tells better; traces have harmonic
means of 10 to 500.
"""
NOMINAL_KV_SHARE: Final = 2.0
"""Reading a full KV cache against a step with nothing in it: 30 to 120 GB of cache, 15 to 140 GB of weights."""
NOMINAL_PREFILL_SHARE: Final = 0.005
"""Computing one prompt token against the same: bytes/s over FLOP/s of today's devices (H100: 3.35e12 / 6e14)."""


def pricing_of(model: StepModel | None, capacity: InstanceCapacity) -> Pricing:
    """What a step costs by a cost model; without one by nominal proportions."""
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
    """Whether a request of this length could run at once: blocks (one more than it fills) and a slot in the batch."""
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


def cheapest(candidates: Iterable[InstanceView]) -> InstanceView | None:
    """The candidate with the lowest price (`Pricing`), the first among equals; None when there is none."""
    return min(candidates, key=_price, default=None)


def pick(candidates: Sequence[InstanceView], length_tokens: int) -> InstanceView | None:
    """The instance that takes a request of this length, or None when there are no candidates at all."""
    best = least_loaded(candidates)
    if best is None or has_room(best, length_tokens):
        return best
    with_room = [instance for instance in candidates if has_room(instance, length_tokens)]
    return least_loaded(
        with_room or [instance for instance in candidates if not (instance.draining or instance.shunned)]
    )
