"""Why an instance was chosen, in words: every rule has its sentence, amounts have their units."""

import math

import pytest

from cascadeinfer.core.choice import Choice, Declined, Measure, Rule, Scored
from cascadeinfer.eventlog.choice_words import MEASURES, reason

THERE = (Scored("i1", 0.0121, 0.31, 0.4), Scored("i0", 1.5, 0.4))
HOME = Scored("i9", 0.02, 0.9, 2.5)
FREE = (Scored("i3", math.inf, 0.0), Scored("i4", 812.4, 0.5))
PRICE = f"lowest {MEASURES[Measure.PRICE]} of"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            Choice(Rule.BEST, Measure.PRICE, THERE, 2, in_seconds=True),
            f"{PRICE} 2: i1 12.1 ms (load 31%, queue 400 ms), i0 1.5 s (load 40%)",
        ),
        (
            Choice(Rule.BEST, Measure.PRICE, THERE, 9),
            f"{PRICE} 9: i1 0.0121 empty steps (load 31%, queue 0.4 empty steps), i0 1.5 empty steps (load 40%) and",
        ),
        (
            Choice(Rule.BEST_WITH_ROOM, Measure.LOAD, THERE, 2, 3),
            "lowest load of 2 with room (3 had none): i1 1.21 %, ",
        ),
        (
            Choice(Rule.NO_ROOM, Measure.LOAD, THERE, 2),
            "no instance has room, so it waits at the one with the lowest load",
        ),
        (
            Choice(Rule.OTHER_STAGE, Measure.PRICE, THERE, 2),
            f"its own stage has no room; {PRICE} 2 in the nearest stage",
        ),
        (
            Choice(Rule.SOONER, Measure.MARGINAL_PRICE, THERE, 2, instead_of=HOME, in_seconds=True),
            f"prompts queue at i9 (2.5 s to compute); lowest {MEASURES[Measure.MARGINAL_PRICE]} of 2 where it starts",
        ),
        (
            Choice(Rule.CACHED, Measure.CACHE_GAIN, THERE[::-1], 2, instead_of=HOME, in_seconds=True),
            f"worth more than i9, from 20 ms on; highest {MEASURES[Measure.CACHE_GAIN]} of 2: i0 1.5 s (load 40%), i1",
        ),
        (
            Choice(Rule.CACHED, Measure.PREFIX_SHARE, (Scored("i1", 0.75, 0.1),), 1, instead_of=Scored("i9", 0.5, 0.0)),
            "worth more than i9, from 50 % on; highest share of its prompt seen there of 1: i1 75 % (load 10%)",
        ),
        (Choice(Rule.IDLE), "it needs a whole cache, so the first idle instance takes it"),
        (Choice(Rule.TURN), "it is this instance's turn; loads are not compared"),
        (Choice(Rule.RANGE), "its prompt is in this instance's range of lengths, and the instances are in balance"),
        (
            Choice(Rule.OUT_OF_BALANCE, Measure.SENT_TOKENS, (Scored("i1", 12345, 0.1),), 1),
            f"the instances are out of balance; lowest {MEASURES[Measure.SENT_TOKENS]} of 1: i1 12,345 (load 10%)",
        ),
        (Choice(Rule.DRAWN, Measure.TOKENS, THERE, 2), "lowest number of tokens there of 2 drawn at random: "),
        (
            Choice(Rule.PAIRED, Measure.FREE_STEPS, FREE, 2, instead_of=Scored("i9", -math.inf, 1.0)),
            f"i9 drains; highest {MEASURES[Measure.FREE_STEPS]} of 2 not yet paired: i3 no limit (load 0%), i4 812.4",
        ),
        (
            Choice(Rule.BEST, Measure.BID, THERE, 2, declined=(Declined("i5", "no_slot"), Declined("i6", "no answer"))),
            "i0 1.5 empty steps (load 40%); declined by i5 (no slot), i6 (no answer)",
        ),
    ],
)
def test_the_words(choice: Choice, words: str) -> None:
    """Rule, measure, candidates with units, and who declined."""
    assert words in reason(choice)


def test_every_rule_and_measure_has_words() -> None:
    """No rule raises, and every measure has a name."""
    assert set(MEASURES) == set(Measure)
    for rule in Rule:
        for measure in Measure:
            assert reason(Choice(rule, measure, THERE, 2, instead_of=HOME)).strip()
