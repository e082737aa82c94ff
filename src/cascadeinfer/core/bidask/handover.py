"""
Which running requests have outgrown their range, and which may move at all.

A request is handed over when it exceeds its range by a margin, not at the boundary itself: boundaries move
(`adapt/boundaries.py`), requests that end just beyond one are not worth a move, and the margin keeps requests near a
boundary from moving back and forth. Requests are handed over upwards only. One that is shorter than its stage's range
(the boundary moved up, or it was placed there for lack of room) grows into it or ends. The longest goes first, because
it slows the others most.

A request may move when it decodes (it is not waiting or parked, and has a token beyond its prompt), nothing pins it, it
is in no migration, and it may still produce enough tokens for the move to pay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cascadeinfer.core.types import UNBOUNDED_TOKENS, RequestId
from cascadeinfer.core.view import InstanceView, RequestView


@dataclass(frozen=True, slots=True)
class HandoverRules:
    """
    When a request has outgrown its range.

    Attributes:
        margin_share: Margin beyond the range's end, as a share of it.
        margin_tokens: Least margin.
        min_remaining_tokens: A request that may produce fewer tokens stays: it would end before the move pays.
    """

    margin_share: float = 0.05
    margin_tokens: int = 16
    min_remaining_tokens: int = 16

    def threshold_tokens(self, hi_tokens: int) -> int:
        """Length from which a request has outgrown a range that ends here."""
        if hi_tokens >= UNBOUNDED_TOKENS:
            return UNBOUNDED_TOKENS
        return hi_tokens + max(self.margin_tokens, int(self.margin_share * hi_tokens))


def may_move(request: RequestView, place: InstanceView, rules: HandoverRules) -> bool:
    """Whether this request, which is on this instance, can be migrated and is worth it. See the module header."""
    tokens = request.tokens
    return (
        request.pin_reason is None
        and request.migration_id is None
        and not request.parked
        and request.place is place
        and tokens > request.prompt_tokens
        and request.request_id not in place.waiting
        and request.prompt_tokens + request.max_output_tokens - tokens >= rules.min_remaining_tokens
    )


def outgrown(
    place: InstanceView, hi_tokens: int, requests: Mapping[RequestId, RequestView], rules: HandoverRules
) -> list[RequestView]:
    """
    Requests on this instance that should be handed over, longest first, ties by arrival.

    Args:
        place: The instance.
        hi_tokens: End of its stage's range.
        requests: All requests by id; only those of this instance are looked at.
        rules: Margins.
    """
    lengths = place.request_ids
    threshold = rules.threshold_tokens(hi_tokens)
    if not lengths or max(lengths.values()) < threshold:
        return []
    found = [requests[request_id] for request_id, tokens in lengths.items() if tokens >= threshold]
    found = [request for request in found if may_move(request, place, rules)]
    return sorted(found, key=lambda request: (-lengths[request.request_id], request.arrival))


def movable(place: InstanceView, requests: Mapping[RequestId, RequestView], rules: HandoverRules) -> list[RequestView]:
    """Everything on this instance that may move, in order of placement."""
    here = [requests[request_id] for request_id in place.request_ids]
    return [request for request in here if may_move(request, place, rules)]
