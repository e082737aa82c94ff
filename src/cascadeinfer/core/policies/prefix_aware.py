"""
SGLang's cache-aware router: go where the prompt's prefix is probably cached, unless the load is out of balance.

Formula, with `load` the number of unfinished requests of an instance:
- Out of balance, that is `max - min > balance_abs` and `max > balance_rel * min`: the shortest queue.
- Else the instance whose past requests share the longest prefix with this one, if that is more than `cache_threshold`
  of the prompt.
- Else the shortest queue.

The prompt's blocks are then assumed to be cached at the chosen instance.

Inputs read: prefix hashes of the prompts, the policy's own dispatches, and finishes. The prefix index
(`prefix_index.py`) is a guess; the engines are never asked. Edge cases: without hashes nothing matches; if the matching
instance is draining or gone, the shortest queue is used. Ties go to the smallest id. No migration. Source: SGLang,
`sgl-model-gateway/src/policies/cache_aware.rs`, with the defaults of its `CacheAwareConfig` (0.5, 32, 1.1). It matches
text by characters, while we match blocks of tokens.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event, InstanceLost
from cascadeinfer.core.placing.dispatch import Chosen, first_of, ranked, scored_as
from cascadeinfer.core.placing.prefix_index import PrefixIndex
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class PrefixAware(PlacingPolicy):
    """Prefix affinity while the load is in balance."""

    def __init__(
        self,
        *,
        cache_threshold: float = 0.5,
        balance_abs: int = 32,
        balance_rel: float = 1.1,
        max_blocks: int = 1 << 20,
    ) -> None:
        """
        Args:
            cache_threshold: Share of the prompt's blocks that must match.
            balance_abs: Difference of loads that still counts as balanced.
            balance_rel: Ratio of loads that still counts as balanced.
            max_blocks: Capacity of the index in blocks; the least recently used are evicted first.
        """
        super().__init__()
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel
        self._index = PrefixIndex(max_blocks)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        if isinstance(event, InstanceLost):
            self._index.forget(event.instance_id)
        return super().handle(event, now_s)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """See the module header."""
        order = ranked(Measure.REQUESTS, _queue, candidates)
        least, most = _queue(order[0]), _queue(order[-1])
        unbalanced = most - least > self._balance_abs and most > self._balance_rel * least
        cached = None if unbalanced else self._cached(request, order)
        rule = Rule.OUT_OF_BALANCE if unbalanced else Rule.BEST
        chosen = cached or first_of(order, Measure.REQUESTS, _queue, rule)
        assert chosen is not None  # candidates is not empty
        self._index.add(request.prefix_hashes, chosen.instance.instance_id)
        return chosen

    def _cached(self, request: RequestView, order: Sequence[InstanceView]) -> Chosen | None:
        """The candidate that has seen enough of the prompt, if there is one, and it is not the first anyway."""
        if not request.prefix_hashes:
            return None
        matched, instance_id = self._index.match(request.prefix_hashes)
        share = matched / len(request.prefix_hashes)
        if share <= self._cache_threshold:
            return None
        holder = [candidate for candidate in order[1:] if candidate.instance_id == instance_id]
        instead_of = scored_as(order[0], self._cache_threshold)
        return first_of(holder, Measure.PREFIX_SHARE, lambda _: share, Rule.CACHED, instead_of=instead_of)


def _queue(instance: InstanceView) -> int:
    return len(instance.request_ids) + instance.foreign_requests


INFO: Final = PolicyInfo(
    make=PrefixAware, help="where the prompt's beginning is probably cached, else the shortest queue"
)
