"""Why an instance was chosen, in words for operators: the rule, the candidates with their scores, who declined."""

import math
from typing import Final

from cascadeinfer.core.choice import HIGHEST_WINS, IN_TIME, Choice, Measure, Rule, Scored

MEASURES: Final = {
    Measure.PRICE: "price (what all there and this one wait per token)",
    Measure.MARGINAL_PRICE: "marginal price (what it costs all there and itself per token)",
    Measure.BID: "price bid (what all there and this one wait per token)",
    Measure.CACHE_GAIN: "gain (what the cached beginning of its prompt saves, less what the place costs)",
    Measure.PREFIX_SHARE: "share of its prompt seen there",
    Measure.LOAD: "load",
    Measure.FREE_STEPS: "number of decode steps until memory runs out",
    Measure.TOKENS: "number of tokens there",
    Measure.REQUESTS: "number of requests there",
    Measure.SENT_TOKENS: "number of prompt tokens sent there lately",
    Measure.BACKLOG: "queue of prompts",
    Measure.VLLM_SCORE: "score of vLLM's balancer",
}

SENTENCES: Final = {
    Rule.BEST: "{best}",
    Rule.BEST_WITH_ROOM: "{best} with room ({n_passed} had none)",
    Rule.NO_ROOM: "no instance has room, so it waits at the one with the {best}",
    Rule.OTHER_STAGE: "its own stage has no room; {best} in the nearest stage with room",
    Rule.IDLE: "it needs a whole cache, so the first idle instance takes it",
    Rule.TURN: "it is this instance's turn; loads are not compared",
    Rule.RANGE: "its prompt is in this instance's range of lengths, and the instances are in balance",
    Rule.OUT_OF_BALANCE: "the instances are out of balance; {best}",
    Rule.DRAWN: "{best} drawn at random",
}
"""Of rules that name no other instance."""


def reason(choice: Choice) -> str:
    """One sentence without an end: why the first candidate was chosen, and what the others scored."""
    parts = [_rule(choice)]
    if choice.scored:
        shown = ", ".join(_candidate(choice, candidate) for candidate in choice.scored)
        left = choice.n_candidates - len(choice.scored)
        parts.append(f": {shown}{f' and {left} more' if left > 0 else ''}")
    if choice.declined:
        declined = ", ".join(f"{d.instance_id} ({d.reason.replace('_', ' ')})" for d in choice.declined)
        parts.append(f"; declined by {declined}")
    return "".join(parts)


def _rule(choice: Choice) -> str:
    best, other = _best(choice), choice.instead_of
    match choice.rule:
        case Rule.SOONER:
            assert other is not None
            queue = _time(choice, other.backlog)
            return f"prompts queue at {other.instance_id} ({queue} to compute); {best} where it starts sooner"
        case Rule.CACHED:
            assert other is not None
            least = _amount(choice, other.score)
            return f"worth more than {other.instance_id}, from {least} on; {best}"
        case Rule.PAIRED:
            assert other is not None
            need = "drains" if math.isinf(other.score) else f"has {_amount(choice, other.score)} steps left"
            return f"{other.instance_id} {need}; {best} not yet paired"
        case _:
            return SENTENCES[choice.rule].format(best=best, n_passed=choice.n_passed)


def _best(choice: Choice) -> str:
    if choice.measure is None:
        return ""
    extreme = "highest" if choice.measure in HIGHEST_WINS else "lowest"
    return f"{extreme} {MEASURES[choice.measure]} of {choice.n_candidates}"


def _candidate(choice: Choice, candidate: Scored) -> str:
    details = []
    if choice.measure is not Measure.LOAD:
        details.append(f"load {candidate.load:.0%}")
    if candidate.backlog > 0.0 and choice.measure in IN_TIME:
        details.append(f"queue {_time(choice, candidate.backlog)}")
    shown = f"{candidate.instance_id} {_amount(choice, candidate.score)}"
    return f"{shown} ({', '.join(details)})" if details else shown


def _amount(choice: Choice, score: float) -> str:
    """A score with its unit."""
    if choice.measure in IN_TIME:
        return _time(choice, score)
    if choice.measure in {Measure.LOAD, Measure.PREFIX_SHARE}:
        return f"{score:.3g}" if not math.isfinite(score) else f"{100.0 * score:.3g} %"
    if math.isinf(score):
        return "no limit" if score > 0.0 else "none"
    return f"{score:,.0f}" if abs(score) >= 1000.0 else f"{score:.4g}"


def _time(choice: Choice, value: float) -> str:
    """A time in the unit of the choice."""
    if not choice.in_seconds:
        return f"{value:.3g} empty steps"
    return f"{value:.3g} s" if value >= 1.0 else f"{1e3 * value:.3g} ms"
