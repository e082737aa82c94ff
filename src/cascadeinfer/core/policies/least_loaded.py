"""
Least loaded: each new request goes to the instance with the lowest load, by KV tokens and batch slots.

Formula: `max(kv tokens / capacity, requests / max_num_seqs)`, see `core/placing/dispatch.py`. Inputs read: reports,
corrected by what has been placed since. Edge case: when no instance has room, the least loaded one queues the request.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.placing.dispatch import Chosen, pick
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class LeastLoaded(PlacingPolicy):
    """Dispatches to the instance with the most room."""

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """The least loaded instance with room; if none has room, the least loaded one."""
        chosen = pick(candidates, request.tokens)
        assert chosen is not None  # candidates is not empty
        return chosen


INFO: Final = PolicyInfo(make=LeastLoaded, help="the instance with the lowest share of KV tokens or batch slots")
