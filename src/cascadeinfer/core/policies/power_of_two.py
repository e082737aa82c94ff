"""
Power of two choices: of two instances drawn at random, the one with fewer tokens takes the request.

Formula: two different instances, each pair equally likely; the lower sum of the lengths of the requests there, waiting
or running, wins; in a tie the first one drawn. Drawing two instead of one brings the longest queue from O(log n) to
O(log log n) (Mitzenmacher 2001), and no instance attracts all of a burst because its load is stale.

Inputs read: reports, corrected by what has been placed since. The draws come from a generator with a seed, so that a
log can be replayed. Edge cases: a single instance takes everything; draining, suspected and too small instances are not
drawn. No migration. Source: SGLang, `sgl-model-gateway/src/policies/power_of_two.rs`, which compares the token loads of
its load monitor (and request counts where a monitor does not answer, which has no counterpart here: everybody reports).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.placing.dispatch import Chosen, first_of, ranked
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class PowerOfTwo(PlacingPolicy):
    """The less loaded of two random instances."""

    def __init__(self, *, seed: int = 0) -> None:
        """
        Args:
            seed: Of the draws.
        """
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:  # noqa: ARG002
        """See the module header."""
        n = len(candidates)
        drawn = list(candidates)
        if n > 1:
            first = int(self._rng.integers(n))
            second = (first + 1 + int(self._rng.integers(n - 1))) % n
            drawn = [candidates[first], candidates[second]]
        chosen = first_of(ranked(Measure.TOKENS, _tokens, drawn), Measure.TOKENS, _tokens, Rule.DRAWN)
        assert chosen is not None  # candidates is not empty
        return chosen


def _tokens(instance: InstanceView) -> int:
    return instance.committed_kv_tokens


INFO: Final = PolicyInfo(make=PowerOfTwo, help="of two random instances, the one with fewer tokens; nothing moves")
