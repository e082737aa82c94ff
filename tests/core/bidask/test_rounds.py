"""The bid-ask table is complete, has no dead ends, and ignores what it does not allow."""

import importlib.util
from itertools import product
from pathlib import Path

import pytest

from cascadeinfer.core.bidask.rounds import TRANSITIONS, BidAskSettings, Round, RoundEvent, State
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.messages import Bid

PROTOCOLS = Path(__file__).parents[3] / "docs" / "protocols"
ASKER = {State.ASKING, State.AWARDING, State.MOVING, State.RESTING}
BIDDER = {State.OFFERING, State.KEEPING, State.RECEIVING}


def round_in(state: State) -> Round:
    """A round in this state."""
    return Round("a:1", "r", 100, MigrationReason.OUTGREW_STAGE, state=state)


@pytest.mark.parametrize(("state", "event"), [k for k in product(State, RoundEvent) if k not in TRANSITIONS])
def test_illegal_event_raises_and_changes_nothing(state: State, event: RoundEvent) -> None:
    """An event that the table does not allow raises InvalidTransition with state and event; the round is unchanged."""
    a_round = round_in(state)
    with pytest.raises(InvalidTransition) as caught:
        a_round.handle(event)
    assert a_round.state is state
    assert (caught.value.state, caught.value.event) == (state.value, event.value)


@pytest.mark.parametrize(("key", "after"), TRANSITIONS.items())
def test_legal_event_leads_where_the_table_says(key: tuple[State, RoundEvent], after: State) -> None:
    """Each transition leads to the state that the table names."""
    a_round = round_in(key[0])
    a_round.handle(key[1])
    assert a_round.state is after


def reachable(start: State) -> set[State]:
    """States that can follow, at any distance."""
    found: set[State] = set()
    front = [start]
    while front:
        state = front.pop()
        after = {t for (s, _), t in TRANSITIONS.items() if s is state} - found
        found |= after
        front += after
    return found


def test_every_state_is_reached_and_every_round_can_end() -> None:
    """NEW leads to every state, every state to CLOSED and CLOSED nowhere; every event is used."""
    assert reachable(State.NEW) == set(State) - {State.NEW}
    assert all(State.CLOSED in reachable(state) for state in State if state is not State.CLOSED)
    assert not reachable(State.CLOSED)
    assert {event for _, event in TRANSITIONS} == set(RoundEvent)


def test_the_two_sides_share_only_the_ends() -> None:
    """An asker never enters a bidder's state, nor a bidder an asker's."""
    assert reachable(State.ASKING) == ASKER | {State.CLOSED}
    assert reachable(State.OFFERING) == (BIDDER - {State.OFFERING}) | {State.CLOSED}


def test_a_kept_place_outlives_the_asker_s_patience() -> None:
    """A bidder keeps an awarded place longer than the asker waits for the accept, and an offer longer than a round."""
    settings = BidAskSettings()
    assert settings.keep_life_s > settings.award_wait_s
    assert settings.offer_life_s > settings.bid_wait_s + 2 * settings.award_wait_s


def test_best_bid_is_the_cheapest() -> None:
    """The lowest price wins; then the lowest load, the fewest migrations, the smallest id."""
    a_round = round_in(State.ASKING)
    assert a_round.ranked_bids() == []
    a_round.bids = {
        "d": Bid("a:1", 0.1, 5, 0, 2.0),
        "c": Bid("a:1", 0.4, 5, 1, 1.0),
        "b": Bid("a:1", 0.4, 5, 0, 1.0),
        "a": Bid("a:1", 0.5, 5, 0, 1.0),
    }
    assert [bidder_id for bidder_id, _ in a_round.ranked_bids()] == ["b", "c", "a", "d"]
    a_round.distances = {"b": 0.5, "c": 2.0}
    ranked = a_round.ranked_bids()
    assert [bidder_id for bidder_id, _ in ranked] == ["a", "b", "d", "c"], "the way there is part of the price"
    assert [scored.score for scored in a_round.choice_among(ranked, in_seconds=True).scored] == [1.0, 1.5, 2.0, 3.0]


def test_page_is_drawn_from_the_table() -> None:
    """The page docs/protocols/bidask.md is what draw.py makes of the table."""
    spec = importlib.util.spec_from_file_location("draw", PROTOCOLS / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert (PROTOCOLS / "bidask.md").read_text() == draw.PAGES["bidask.md"](), "run: python docs/protocols/draw.py"
