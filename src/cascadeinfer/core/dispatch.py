"""
Which instance takes a request: filter, score, pick.

Formula: among the candidates that have room, the least loaded; when none has room, the least loaded of all (its engine queues
the request, which is what vLLM does). Ties go to the smallest id. Source of the filter-score-pick split: llm-d's scheduler.
"""

from collections.abc import Iterable

from cascadeinfer.core.view import InstanceView


def load_of(instance: InstanceView) -> float:
    """
    Load of an instance: the larger of its KV share and its batch share, waiting requests counted (dimensionless).

    1.0 is full. Requests on their way by migration count, so two movers do not see the same free place.
    """
    capacity = instance.capacity
    return max(
        instance.committed_kv_tokens / capacity.kv_tokens,
        instance.committed_requests / capacity.max_num_seqs,
    )


def has_room(instance: InstanceView, length_tokens: int) -> bool:
    """Whether a request of this length could run at once: blocks (one more than it fills) and a slot in the batch."""
    capacity = instance.capacity
    return (
        not instance.draining
        and instance.committed_requests < capacity.max_num_seqs
        and instance.free_blocks() >= capacity.blocks_for(length_tokens) + 1
    )


def least_loaded(candidates: Iterable[InstanceView]) -> InstanceView | None:
    """The candidate with the lowest load, the smallest id among equals; None when there is none."""
    return min(candidates, key=lambda instance: (load_of(instance), instance.instance_id), default=None)


def pick(candidates: Iterable[InstanceView], length_tokens: int) -> InstanceView | None:
    """The instance that takes a request of this length, or None when there are no candidates at all."""
    everyone = [instance for instance in candidates if not instance.draining]
    return least_loaded([i for i in everyone if has_room(i, length_tokens)]) or least_loaded(everyone)
