"""
Which instance takes a request: filter, score, pick.

Formula: the least loaded of the candidates that have room; if none has room, the least loaded of all (its engine queues
the request, as vLLM does). Ties go to the first candidate; callers pass them sorted by id. Load is `max(kv tokens /
capacity, requests / max_num_seqs)` (`InstanceView.load`) and counts inbound migrations, so that two migrations do not
both see the same free place. An instance whose steps take longer than its peers' (`core/pace.py`) counts as
proportionally fuller (`InstanceView.slowed_load`). A suspected instance has no room while another is not suspected.

*Price* is the finer measure: the total of seconds that all requests of an instance and the newcomer wait per token
(`Pricing`). Among rules that know no output length it gave the lowest mean latency in simulation on every trace and
load tried: by 4 to 6 % against KV tokens at high load, 1 to 5 % against request counts, 0 to 2 % against Llumnix'
freeness. Source of the filter-score-pick split: llm-d's scheduler.

Whatever is picked comes as `Chosen`: with the scores that it was picked by, for operators (`core/choice.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

from cascadeinfer.core.choice import HIGHEST_WINS, IN_TIME, MOST_SCORED, Choice, Measure, Rule, Scored
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import InstanceView, Pricing

_load = attrgetter("slowed_load")
_price = attrgetter("price")

TYPICAL_OUTPUT_TOKENS: Final = 128
"""Tokens over which a newcomer's wait for its first is amortised until the workload is known; the harmonic mean of
output lengths is 10 to 500 in traces.
"""
NOMINAL_KV_SHARE: Final = 2.0
"""Reading a full KV cache relative to an empty step: 30 to 120 GB of cache, 15 to 140 GB of weights."""
NOMINAL_PREFILL_SHARE: Final = 0.005
"""Computing one prompt token relative to the same: bytes/s over FLOP/s of today's devices (H100: 3.35e12 / 6e14)."""


def pricing_of(model: StepModel | None, capacity: InstanceCapacity) -> Pricing:
    """Step costs from a cost model; without one, nominal proportions."""
    if model is None:
        return Pricing(
            base=1.0,
            per_token=NOMINAL_KV_SHARE / capacity.kv_tokens,
            per_queued_token=NOMINAL_PREFILL_SHARE,
            urgency=1.0 / TYPICAL_OUTPUT_TOKENS,
        )
    return Pricing(
        base=model.base_s,
        per_request=model.per_decode_s,
        per_token=model.per_kv_token_s,
        per_queued_token=model.compute_per_prefill_token_s,
        per_queued_pair=model.per_prefill_attention_s / 2.0,
        urgency=1.0 / TYPICAL_OUTPUT_TOKENS,
        in_seconds=True,
    )


class Chosen(NamedTuple):
    """An instance, and why; None where there is nothing to say."""

    instance: InstanceView
    choice: Choice | None = None


def ranked(
    measure: Measure, score_of: Callable[[InstanceView], float], candidates: Iterable[InstanceView]
) -> list[InstanceView]:
    """The candidates, the best first; equals in the order given."""
    return sorted(candidates, key=score_of, reverse=measure in HIGHEST_WINS)


def first_of(
    order: Sequence[InstanceView],
    measure: Measure,
    score_of: Callable[[InstanceView], float],
    rule: Rule = Rule.BEST,
    *,
    n_passed: int = 0,
    instead_of: Scored | None = None,
) -> Chosen | None:
    """
    The first of ranked candidates with its reason; None when there is none.

    Args:
        order: The candidates, the best first (`ranked`).
        measure, score_of: What they were ranked by.
        rule: Why the best one was chosen, if not only for that.
        n_passed, instead_of: See `Choice`.
    """
    if not order:
        return None
    best = order[0]
    scored = tuple([Scored(i.instance_id, float(score_of(i)), i.load, i.backlog) for i in order[:MOST_SCORED]])
    in_seconds = measure in IN_TIME and best.pricing.in_seconds
    choice = Choice(rule, measure, scored, len(order), n_passed, instead_of, (), in_seconds)
    return Chosen(best, choice)


def scored_as(instance: InstanceView, score: float) -> Scored:
    """A candidate as it is now."""
    return Scored(instance.instance_id, float(score), instance.load, instance.backlog)


def has_room(instance: InstanceView, length_tokens: int) -> bool:
    """Whether a request of this length could run at once: enough blocks (one more than it fills) and a batch slot."""
    capacity = instance.capacity
    return (
        not instance.draining
        and not instance.shunned
        and instance.committed_requests < capacity.max_num_seqs
        and instance.free_blocks() >= capacity.blocks_for(length_tokens) + 1
    )


def least_loaded(candidates: Iterable[InstanceView]) -> Chosen | None:
    """The candidate with the lowest load, the first among equals; None when there is none."""
    return first_of(ranked(Measure.LOAD, _load, candidates), Measure.LOAD, _load)


def cheapest(candidates: Iterable[InstanceView], rule: Rule = Rule.BEST) -> Chosen | None:
    """The candidate with the lowest price (`Pricing`), the first among equals; None when there is none."""
    return first_of(ranked(Measure.PRICE, _price, candidates), Measure.PRICE, _price, rule)


def cheapest_with_room(
    candidates: Sequence[InstanceView], length_tokens: int, rule: Rule = Rule.BEST_WITH_ROOM
) -> Chosen | None:
    """The instance with the lowest price on which a request of this length could run at once, or None."""
    order = ranked(Measure.PRICE, _price, candidates)
    if order and has_room(order[0], length_tokens):
        return first_of(order, Measure.PRICE, _price, Rule.BEST if rule is Rule.BEST_WITH_ROOM else rule)
    fitting = [instance for instance in order if has_room(instance, length_tokens)]
    return first_of(fitting, Measure.PRICE, _price, rule, n_passed=len(order) - len(fitting))


def nearest_with_room(stages: Sequence[Sequence[InstanceView]], home: int, length_tokens: int) -> Chosen | None:
    """The cheapest instance with room in this stage, or in the nearest one that has any, the longer one first."""
    for distance in range(len(stages)):
        for index in (home + distance, home - distance)[: 2 if distance else 1]:
            if 0 <= index < len(stages):
                rule = Rule.OTHER_STAGE if distance else Rule.BEST_WITH_ROOM
                chosen = cheapest_with_room(stages[index], length_tokens, rule)
                if chosen is not None:
                    return chosen
    return None


def pick(candidates: Sequence[InstanceView], length_tokens: int) -> Chosen | None:
    """The instance that takes a request of this length, or None without candidates."""
    order = ranked(Measure.LOAD, _load, candidates)
    if order and has_room(order[0], length_tokens):
        return first_of(order, Measure.LOAD, _load)
    fitting = [instance for instance in order if has_room(instance, length_tokens)]
    if fitting:
        return first_of(fitting, Measure.LOAD, _load, Rule.BEST_WITH_ROOM, n_passed=len(order) - len(fitting))
    open_ones = [instance for instance in order if not (instance.draining or instance.shunned)]
    return first_of(open_ones, Measure.LOAD, _load, Rule.NO_ROOM)
