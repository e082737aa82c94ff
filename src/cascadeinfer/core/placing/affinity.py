"""
Prefix-cache affinity: a request goes where its prompt's beginning is cached when that is worth more than the right place.

The right place is the one that the policy would choose without a cache: the cheapest instance of the request's stage. Another instance
takes it instead when

    saved there > extra cost there + MARGIN * marginal price of the right place,

all per token of the requests concerned (`InstanceView.marginal_price`). `saved` is the time in which the part of the prompt would be computed that is cached
there and not at the right place: everybody on that instance would wait for it, as much as urgency says that a first token matters. The extra cost is the
difference of the marginal prices with no more cached there than at the right place, and at least nothing: that another instance is idle, or that its stage
is the wrong one, is no reason to go there, only a cache is.

What is cached where is a guess from own dispatches and moves (`core/placing/prefix_index.py`); the engines are not asked. A guess that is
wrong costs one prefill. Inputs read: hashes of the prompt's blocks; without them, or where nothing matches, nothing changes. A draining
or full instance is no candidate.
"""

from collections.abc import Sequence

from cascadeinfer.core.instance import InstanceView
from cascadeinfer.core.placing.dispatch import has_room
from cascadeinfer.core.placing.prefix_index import PrefixIndex
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import RequestView

MARGIN = 0.03
"""A smaller gain is none, as for plans."""
MAX_BLOCKS = 1 << 20
"""Blocks that are remembered; the least recently used go first."""


class PrefixAffinity:
    """See the module header."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        """
        Args:
            max_blocks: Blocks that are remembered, counted once per instance.
        """
        self._index = PrefixIndex(max_blocks)

    def note_place(self, request: RequestView, instance_id: InstanceId) -> None:
        """The prompt is computed, or its KV cache has arrived, there."""
        if request.prefix_hashes:
            self._index.add(request.prefix_hashes, instance_id)

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone, and its cache with it."""
        self._index.forget(instance_id)

    def choose(self, request: RequestView, right: InstanceView, instances: Sequence[InstanceView]) -> InstanceView:
        """
        The instance that takes a request.

        Args:
            request: With its hashes, or none.
            right: Where it would go without a cache.
            instances: Those of all stages.
        """
        matched = self._index.matches(request.prefix_hashes)
        if not matched:
            return right
        tokens = request.tokens
        share = min(request.prompt_tokens, tokens - 1) / len(request.prefix_hashes)  # the last token is always computed
        blocks_right = matched.get(right.instance_id, 0)
        cached_right = int(blocks_right * share)
        price_right = right.marginal_price(tokens, cached_right)
        best, best_gain = right, MARGIN * price_right
        for instance in instances:
            blocks = matched.get(instance.instance_id, 0)
            if blocks <= blocks_right or not has_room(instance, tokens):
                continue
            price = instance.marginal_price(tokens, cached_right)
            saved = price - instance.marginal_price(tokens, int(blocks * share))
            gain = saved - max(0.0, price - price_right)
            if gain > best_gain:
                best, best_gain = instance, gain
        return best
