"""
SGLang's bucket policy: each instance takes one range of prompt lengths, and the ranges carry equal loads.

Formula, with the load of an instance being the prompt tokens that it was sent in the last `interval_s`:
- Out of balance, that is `max - min > balance_abs` and `max > balance_rel * min`: the instance with the least load.
- Else the instance in whose range the prompt length lies.

Every `interval_s` the ranges follow the prompts of that time: sorted by length, they are dealt out in order, and a
range ends at the prompt with which it has its equal share of all tokens. They stay while that share is within a factor
of two of the one that they were made for. Before the first time they divide [0, `first_tokens`) equally.

Inputs read: prompt lengths and the policy's own dispatches; nothing of what instances report. Edge cases: prompts that
run out before the instances leave ranges as wide as a share; the last range has no end. When instances come or go, the
ranges are made anew at once; draining, suspected and too small instances have none. Ties go to the smallest id. No
migration. Source: SGLang, `sgl-model-gateway/src/policies/bucket.rs`, with the defaults of its `BucketConfig` (32
characters, 1.0001, 5 s; ranges begin with 4,096 characters). It counts characters; we count tokens, four to one. It
serves prefill instances there; here each instance also decodes. It keeps the loads of requests that are older than the
window until the next one arrives, as we do.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from cascadeinfer.core.choice import Choice, Measure, Rule
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.events import Event
from cascadeinfer.core.placing.dispatch import Chosen, first_of, ranked
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import InstanceView, RequestView

STEADY: Final = 2.0
"""Ranges stay while the share per instance is within this factor of the one that they were made for."""


class Bucket(PlacingPolicy):
    """One range of prompt lengths per instance, unless the load is out of balance."""

    def __init__(
        self,
        *,
        balance_abs: int = 8,
        balance_rel: float = 1.0001,
        interval_s: float = 5.0,
        first_tokens: int = 1024,
    ) -> None:
        """
        Args:
            balance_abs: Difference of loads, in tokens, that still counts as balanced.
            balance_rel: Ratio of loads that still counts as balanced.
            interval_s: Time over which loads are counted, and between two adjustments of the ranges.
            first_tokens: What the first ranges divide.

        Raises:
            ConfigError: `interval_s` or `first_tokens` is not positive.
        """
        super().__init__()
        if not (math.isfinite(interval_s) and interval_s > 0.0):
            raise ConfigError(f"{interval_s} is not a positive number", option="interval_s", fix="seconds")
        if first_tokens < 1:
            raise ConfigError(f"{first_tokens} is not at least 1", option="first_tokens")
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel
        self._interval_s = interval_s
        self._first_tokens = first_tokens
        self._now_s = 0.0
        self._next_s = interval_s
        self._sent: deque[tuple[float, int, InstanceId]] = deque()
        self._loads: dict[InstanceId, int] = {}
        self._ids: tuple[InstanceId, ...] = ()
        self._last_tokens: list[int] = []
        self._share = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        self._now_s = now_s
        return super().handle(event, now_s)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """See the module header."""
        self._follow(candidates)
        order = ranked(Measure.SENT_TOKENS, self._sent_to, candidates)
        least, most = self._sent_to(order[0]), self._sent_to(order[-1])
        if most - least > self._balance_abs and most > self._balance_rel * least:
            chosen = first_of(order, Measure.SENT_TOKENS, self._sent_to, Rule.OUT_OF_BALANCE)
            assert chosen is not None  # candidates is not empty
        else:
            chosen = Chosen(candidates[bisect_left(self._last_tokens, request.prompt_tokens)], Choice(Rule.RANGE))
        self._note(request.prompt_tokens, chosen.instance.instance_id)
        return chosen

    def _sent_to(self, instance: InstanceView) -> int:
        return self._loads.get(instance.instance_id, 0)

    def _follow(self, candidates: Sequence[InstanceView]) -> None:
        """Adjust the ranges to the instances there are, and at the end of an interval to its prompts."""
        ids = tuple([instance.instance_id for instance in candidates])
        due = self._now_s >= self._next_s
        if due:
            self._next_s = self._now_s + self._interval_s
        if ids == self._ids and not (due and self._sent):
            return
        prompts = [tokens for _, tokens, _ in self._sent]
        share = sum(prompts) // len(ids)
        if ids == self._ids and self._share and self._share <= STEADY * share and share <= STEADY * self._share:
            return
        self._ids = ids
        if prompts:
            self._share = share
            self._last_tokens = equal_shares(prompts, len(ids))
        else:
            width = max(1, self._first_tokens // len(ids))
            self._last_tokens = [(number + 1) * width - 1 for number in range(len(ids) - 1)]

    def _note(self, tokens: int, instance_id: InstanceId) -> None:
        """Count a request at its instance, and forget those that are older than the window."""
        self._loads[instance_id] = self._loads.get(instance_id, 0) + tokens
        self._sent.append((self._now_s, tokens, instance_id))
        while self._sent[0][0] < self._now_s - self._interval_s:
            _, old_tokens, old_id = self._sent.popleft()
            self._loads[old_id] -= old_tokens
            if not self._loads[old_id]:
                del self._loads[old_id]


def equal_shares(prompts_tokens: Iterable[int], n: int) -> list[int]:
    """
    Ranges of prompt lengths with about equal sums.

    Args:
        prompts_tokens: Lengths of the prompts, at least one.
        n: Number of ranges, at least 1.

    Returns:
        The last length of each range but the last, strictly increasing; n - 1 of them.
    """
    prompts = sorted(prompts_tokens)
    share = sum(prompts) // n
    ends: list[int] = []
    begin, place = 0, 0
    for _ in range(n - 1):
        end, together = begin + share, 0
        while place < len(prompts) and together < share:
            together += prompts[place]
            place += 1
        if place and together >= share and prompts[place - 1] > begin:
            end = prompts[place - 1]
        ends.append(end)
        begin = end + 1
    return ends


INFO: Final = PolicyInfo(
    make=Bucket, help="the instance whose range of prompt lengths it is, or the least sent to; nothing moves"
)
