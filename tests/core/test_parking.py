"""The table of parking is complete, has no dead ends, and refuses what it does not know."""

import pytest

from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.parking import TRANSITIONS, Parking, ParkingAction, ParkingEvent, ParkingState

OPEN = [state for state in ParkingState if state is not ParkingState.OVER]


@pytest.mark.parametrize("state", OPEN)
def test_a_request_can_leave_at_any_time(state: ParkingState) -> None:
    """It may end, lose its client or its instance in every state."""
    assert TRANSITIONS[state, ParkingEvent.LEFT][0] is ParkingState.OVER


@pytest.mark.parametrize("event", ParkingEvent)
@pytest.mark.parametrize("state", ParkingState)
def test_each_pair_is_followed_or_refused(state: ParkingState, event: ParkingEvent) -> None:
    """A combination in the table leads on; any other raises, names the story, and changes nothing."""
    parking = Parking("r", state)
    if (state, event) in TRANSITIONS:
        following, actions = TRANSITIONS[state, event]
        assert parking.handle(event) == actions
        assert parking.state is following
    else:
        with pytest.raises(InvalidTransition) as raised:
            parking.handle(event)
        assert (raised.value.state, raised.value.event) == (state.value, event.value)
        assert parking.state is state


def test_every_state_and_action_is_reached() -> None:
    """From the first state each other one is reached, and every action is used."""
    seen, todo = {ParkingState.PREFILLING}, [ParkingState.PREFILLING]
    while todo:
        state = todo.pop()
        for (before, _), (following, _) in TRANSITIONS.items():
            if before is state and following not in seen:
                seen.add(following)
                todo.append(following)
    assert seen == set(ParkingState)
    assert {action for _, actions in TRANSITIONS.values() for action in actions} == set(ParkingAction)
