"""
Sharing a backlog: a new request leaves its stage while prompts queue there and it starts sooner elsewhere.

An instance has a *backlog* when the prompts that do not decode yet take longer to compute than one full step takes
(`Pricing.full_step`: its token budget at the cost of a prompt token), and than `SHORT` empty steps, in case the budget
is small. Up to there, a newcomer's prompt begins in the step after the next one at the latest, or after a wait that its
decode makes up for; beyond, it waits for steps in which it has no part. With the longer of the two as the unit,

    candidates = instances with room whose queue is shorter by a good part of the unit
    chosen     = the candidate with the lowest marginal price (`InstanceView.marginal_price`)

The marginal price counts what the newcomer costs everybody there, its own wait included, and is comparable between
stages. How much shorter the queue has to be depends on who would pay. In its own stage or a longer one, that is mostly
the newcomer, whose tokens come at the pace of longer requests: `RELIEF` units. In a shorter stage everybody does, for
all their tokens, until the newcomer is handed over: `RELIEF_BELOW`.

Inputs read: the queues of the policy's books (own dispatches and reports, those of other front ends as reported).
Thresholds follow from the step model and the token budget, or from nominal proportions where nothing is known. Edge
cases: no candidate: the request stays, as without sharing; a slow instance's queue counts as longer. A request that is
shorter than its new stage stays there, as everywhere. Without a backlog nothing is computed and nothing changes.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.instance import InstanceView
from cascadeinfer.core.placing.dispatch import Chosen, first_of, has_room, ranked, scored_as

SHORT: Final = 8.0
"""Empty steps: a shorter queue is no backlog, whatever the token budget. With budgets of 1,024 and less, half of the
requests of the case below were shared otherwise.
"""
RELIEF: Final = 0.5
"""Units by which a prompt has to start sooner: less is not worth another place."""
RELIEF_BELOW: Final = 4.0
"""The same in a stage of shorter requests. With 0.5 there as well, the simulated mean normalised latency of Azure's
conversations on 16 A100 rose by 8 % (at 85 % load), because whole stages of short requests paid for single prompts.
"""


def relief_for(home: InstanceView, tokens: int, stages: Sequence[Sequence[InstanceView]]) -> Chosen | None:
    """
    The instance that takes a request instead of its home, or None: it has no backlog, or nobody relieves it.

    Args:
        home: The instance that would take the request.
        tokens: Length of the request.
        stages: For each stage, in order of length, the instances that could hold the request.
    """
    unit = max(home.pricing.full_step(home.capacity.max_batched_tokens), SHORT * home.pricing.base)
    if home.backlog <= unit:
        return None
    candidates: list[InstanceView] = []
    needed = RELIEF_BELOW
    for members in stages:
        if home in members:
            needed = RELIEF
        most = home.backlog - needed * unit
        candidates += [instance for instance in members if instance.backlog <= most and has_room(instance, tokens)]
    if not candidates:
        return None

    def price_of(instance: InstanceView) -> float:
        return instance.marginal_price(tokens, 0)

    order = ranked(Measure.MARGINAL_PRICE, price_of, candidates)
    instead_of = scored_as(home, price_of(home))
    return first_of(order, Measure.MARGINAL_PRICE, price_of, Rule.SOONER, instead_of=instead_of)
