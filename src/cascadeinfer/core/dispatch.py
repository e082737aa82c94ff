"""
Which instance takes a request: filter, score, pick.

Formula: among the candidates that have room, the least loaded; when none has room, the least loaded of all (its engine queues
the request, which is what vLLM does). Ties go to the first candidate; callers pass them sorted by id. Load is
`max(kv tokens / capacity, requests / max_num_seqs)` (`InstanceView.load`), requests on their way by migration counted, so two
movers do not see the same free place. Source of the filter-score-pick split: llm-d's scheduler.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter

from cascadeinfer.core.view import InstanceView

_load = attrgetter("load")


def load_of(instance: InstanceView) -> float:
    """Load of an instance, see the module header (dimensionless, 1.0 is full)."""
    return instance.load


def has_room(instance: InstanceView, length_tokens: int) -> bool:
    """Whether a request of this length could run at once: blocks (one more than it fills) and a slot in the batch."""
    capacity = instance.capacity
    return (
        not instance.draining
        and instance.committed_requests < capacity.max_num_seqs
        and instance.free_blocks() >= capacity.blocks_for(length_tokens) + 1
    )


def least_loaded(candidates: Iterable[InstanceView]) -> InstanceView | None:
    """The candidate with the lowest load, the first among equals; None when there is none."""
    return min(candidates, key=_load, default=None)


def pick_with_room(candidates: Sequence[InstanceView], length_tokens: int) -> InstanceView | None:
    """The least loaded instance on which a request of this length could run at once, or None."""
    best = least_loaded(candidates)
    if best is None or has_room(best, length_tokens):
        return best
    return least_loaded([instance for instance in candidates if has_room(instance, length_tokens)])


def pick(candidates: Sequence[InstanceView], length_tokens: int) -> InstanceView | None:
    """The instance that takes a request of this length, or None when there are no candidates at all."""
    return pick_with_room(candidates, length_tokens) or least_loaded([i for i in candidates if not i.draining])
