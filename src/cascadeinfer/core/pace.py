"""
How slow an instance is compared with the others, from the steps that it reports.

    cost(instance)     = observed seconds / seconds expected by the price list, over its last reports without the worst
    slowness(instance) = cost(instance) / lower median of the costs of all instances

The comparison is with the other instances, because a price list that is wrong, or only proportional, is wrong for all
of them alike. (Where it is wrong for one kind of instance only, those are slower or faster than priced, and this
corrects it.) It spans many reports, because an instance that is stopped most of the time takes most steps as fast as
ever and one of them very long. The worst report is left out, because a single hiccup means nothing. A slowness below
`SLOW_FROM` (or, once it was above, `SLOW_UNTIL`) counts as 1: identical instances differ by noise, and noise must
decide nothing.

An idle instance provides no evidence: what is known of it fades, so that it is tried again.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.types import InstanceId

REPORTS_KEPT: Final = 16
"""Reports with steps that count: 1.6 s of work at the usual interval."""
REPORTS_NEEDED: Final = 4
"""With fewer reports nothing is known."""
IDLE_REPORTS_PER_FADING: Final = 30
"""
After this many usual intervals without a step, the oldest report with steps is forgotten: where the interval is 0.1 s,
an idle instance is tried again after 39 s.
"""
SLOW_FROM: Final = 2.0
"""
Between a stage of long requests and one of short requests, price lists that are only proportional err by less than
this.
"""
SLOW_UNTIL: Final = 1.5


class StepPrices(Protocol):
    """Cost of a step, linear in its contents; see `Pricing`."""

    base: float
    per_request: float
    per_token: float
    per_queued_token: float
    per_queued_pair: float


class Pace:
    """The steps of one instance's last reports, summed per report so that another price list can be applied to them."""

    def __init__(self) -> None:
        """Start with no knowledge."""
        self._reports: deque[tuple[float, int, int, int, int, float]] = deque(maxlen=REPORTS_KEPT)
        self._idle_reports = 0

    def note(self, steps: Sequence[StepSample], intervals: int = 1) -> bool:
        """Record the steps of one report, after this many usual intervals. Returns whether that changes anything."""
        if not steps:
            before = self._idle_reports // IDLE_REPORTS_PER_FADING
            self._idle_reports += intervals
            forgotten = min(len(self._reports), self._idle_reports // IDLE_REPORTS_PER_FADING - before)
            for _ in range(forgotten):
                self._reports.popleft()
            return forgotten > 0
        self._idle_reports = 0
        batches = [step.batch for step in steps]
        self._reports.append(
            (
                sum([step.step_s for step in steps]),
                len(steps),
                sum([batch.n_decode for batch in batches]),
                sum([batch.decode_kv_tokens for batch in batches]),
                sum([batch.prefill_tokens for batch in batches]),
                sum([batch.prefill_attention_tokens for batch in batches]),
            )
        )
        return True

    def cost(self, prices: StepPrices) -> float | None:
        """Observed over expected seconds, see the module header; None while too little is known."""
        if len(self._reports) < REPORTS_NEEDED:
            return None
        pairs = [(report[0], _expected(prices, *report[1:])) for report in self._reports]
        pairs = [(observed, expected) for observed, expected in pairs if expected > 0.0]
        if len(pairs) < REPORTS_NEEDED:
            return None
        pairs.remove(max(pairs, key=lambda pair: pair[0] / pair[1]))
        observed, expected = (sum(column) for column in zip(*pairs, strict=True))
        return observed / expected if observed > 0.0 else None


def _expected(prices: StepPrices, n: int, decodes: int, kv_tokens: int, prefill_tokens: int, pairs: float) -> float:
    return (
        n * prices.base
        + decodes * prices.per_request
        + kv_tokens * prices.per_token
        + prefill_tokens * prices.per_queued_token
        + 2.0 * pairs * prices.per_queued_pair
    )


def lower_median(costs: Iterable[float]) -> float | None:
    """The middle value, the smaller of two; None for no values."""
    ranked = sorted(costs)
    return ranked[(len(ranked) - 1) // 2] if ranked else None


def slowness_of(costs: Mapping[InstanceId, float], before: Mapping[InstanceId, float]) -> dict[InstanceId, float]:
    """
    How slow each instance is compared with the others; 1.0 where it makes no difference.

    Args:
        costs: Costs of the instances of which enough is known.
        before: The previous slowness of each instance.
    """
    usual = lower_median(costs.values())
    slowness: dict[InstanceId, float] = {}
    for instance_id, cost in costs.items():
        assert usual is not None  # costs is not empty
        slowness[instance_id] = _slowness(cost / usual, before.get(instance_id, 1.0))
    return slowness


def _slowness(ratio: float, before: float) -> float:
    return ratio if ratio >= (SLOW_UNTIL if before > 1.0 else SLOW_FROM) else 1.0


class Costs:
    """The costs of the instances of which enough is known, ranked: after a change, only the slow ones are looked at."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._of: dict[InstanceId, float] = {}
        self._ranked: list[tuple[float, InstanceId]] = []

    def note(self, instance_id: InstanceId, cost: float | None) -> None:
        """Record the cost of an instance; None: too little is known, or it is gone."""
        if (before := self._of.pop(instance_id, None)) is not None:
            del self._ranked[bisect_left(self._ranked, (before, instance_id))]
        if cost is not None:
            self._of[instance_id] = cost
            insort(self._ranked, (cost, instance_id))

    def clear(self) -> None:
        """Forget all."""
        self._of.clear()
        self._ranked.clear()

    def among(self, instance_ids: Iterable[InstanceId]) -> dict[InstanceId, float]:
        """The costs of those of these of which enough is known."""
        return {instance_id: self._of[instance_id] for instance_id in instance_ids if instance_id in self._of}

    def slow(self, before: Mapping[InstanceId, float]) -> dict[InstanceId, float]:
        """
        The instances whose slowness is above 1, with it: those that `slowness_of` gives for all.

        Args:
            before: The previous slowness of each instance for which it was above 1.
        """
        if not self._ranked:
            return {}
        usual = self._ranked[(len(self._ranked) - 1) // 2][0]
        slow: dict[InstanceId, float] = {}
        for cost, instance_id in reversed(self._ranked):
            ratio = cost / usual
            if ratio < SLOW_UNTIL:
                break
            if (slowness := _slowness(ratio, before.get(instance_id, 1.0))) > 1.0:
                slow[instance_id] = slowness
        return slow
