"""
Prefix-cache affinity: a request goes where the beginning of its prompt is cached if that outweighs the right place.

The right place is the one the policy would choose without a cache: the cheapest instance of the request's stage.
Another instance takes the request instead when

    saved there > extra cost there + MARGIN * marginal price of the right place,

all per token of the requests concerned (`InstanceView.marginal_price`). `saved` is the time to compute the part of the
prompt that is cached there and not at the right place: every request on that instance would wait for it, and urgency
says how much a first token matters. The extra cost is the difference of the marginal prices with no more cached there
than at the right place, and never negative: an instance is not chosen because it is idle, or because its stage is
another one, but only for its cache.

What is cached where is a guess from the policy's own dispatches and moves (`core/placing/prefix_index.py`); the engines
are not asked. A wrong guess costs one prefill. Inputs read: hashes of the prompt's blocks; without them, or without a
match, nothing changes. A draining or full instance is not a candidate.
"""

from collections.abc import Sequence

from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.instance import InstanceView
from cascadeinfer.core.placing.dispatch import Chosen, first_of, has_room, ranked, scored_as
from cascadeinfer.core.placing.prefix_index import PrefixIndex
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import RequestView

MARGIN = 0.03
"""Smaller gains are ignored, as with plans."""
MAX_BLOCKS = 1 << 20
"""Capacity of the index in blocks; the least recently used are evicted first."""


class PrefixAffinity:
    """See the module header."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        """
        Args:
            max_blocks: Capacity of the index in blocks, counted once per instance.
        """
        self._index = PrefixIndex(max_blocks)

    def note_place(self, request: RequestView, instance_id: InstanceId) -> None:
        """Record that the prompt's KV cache has been computed on, or transferred to, this instance."""
        if request.prefix_hashes:
            self._index.add(request.prefix_hashes, instance_id)

    def forget(self, instance_id: InstanceId) -> None:
        """Forget an instance that is gone, together with its cache."""
        self._index.forget(instance_id)

    def choose(self, request: RequestView, place: Chosen, instances: Sequence[InstanceView]) -> Chosen:
        """
        The instance for a request.

        Args:
            request: With or without prefix hashes.
            place: The instance it would go to without a cache, the right one.
            instances: The candidates, from all stages.

        Returns:
            `place` itself unless another one takes it.
        """
        matched = self._index.matches(request.prefix_hashes)
        if not matched:
            return place
        right = place.instance
        tokens = request.tokens
        share = min(request.prompt_tokens, tokens - 1) / len(request.prefix_hashes)  # the last token is always computed
        blocks_right = matched.get(right.instance_id, 0)
        cached_right = int(blocks_right * share)
        price_right = right.marginal_price(tokens, cached_right)
        least_gain = MARGIN * price_right
        gains: dict[InstanceId, float] = {}
        for instance in instances:
            blocks = matched.get(instance.instance_id, 0)
            if blocks <= blocks_right or not has_room(instance, tokens):
                continue
            price = instance.marginal_price(tokens, cached_right)
            saved = price - instance.marginal_price(tokens, int(blocks * share))
            gain = saved - max(0.0, price - price_right)
            if gain > least_gain:
                gains[instance.instance_id] = gain
        if not gains:
            return place

        def gain_of(instance: InstanceView) -> float:
            return gains[instance.instance_id]

        order = ranked(Measure.CACHE_GAIN, gain_of, [i for i in instances if i.instance_id in gains])
        instead_of = scored_as(right, least_gain)
        return first_of(order, Measure.CACHE_GAIN, gain_of, Rule.CACHED, instead_of=instead_of) or place
