"""Events, effects and options as JSON: all come back unchanged, and nothing else is accepted."""

import math
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.core.adapt.boundaries import RefineSettings
from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.bidask.handover import HandoverRules
from cascadeinfer.core.bidask.rounds import BidAskSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Effect, SendMessage
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import Ask
from cascadeinfer.core.plan.objective import (
    BalancedLatency,
    BuiltInObjective,
    Objective,
    SloAttainment,
    WeightedLatency,
)
from cascadeinfer.core.plan.problem import HandOverCost, ServiceFloor
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.eventlog.codec import Wire, options_back, options_out, wire_of
from support.event_values import EFFECTS, EVENTS

LAYOUT = StageLayout.from_boundaries((100, 900), (("a",), ("b", "c"), ("d",)))
OPTIONS: dict[str, dict[str, Any]] = {
    "cascade": {
        "layout": LAYOUT,
        "step_model": StepModel(
            base_s=0.1,
            per_decode_s=1e-3,
            per_kv_token_s=0.1 + 0.2,
            per_prefill_token_s=0.0,
            per_prefill_attention_s=0.0,
        ),
        "refine": False,
        "max_queued": 7,
        "balance": BidAskSettings(),
        "handover": HandoverRules(min_remaining_tokens=5),
        "refinement": RefineSettings(interval_s=0.3),
        "planning": PlanSettings(
            objective=SloAttainment(2.0, 0.1), hand_over=HandOverCost(pause_per_token_s=1e-9), floor=ServiceFloor()
        ),
    },
    "static_stages": {"layout": LAYOUT, "retry_s": 0.25},
    "static_length": {"boundaries_tokens": (7, 70)},
    "llumnix": {"migrate_steps": math.inf},
}


def through_json(wire: Wire, value: Any) -> Any:
    """A value, encoded and decoded."""
    assert wire.out is not None
    assert wire.back is not None
    return wire.back(msgspec.json.decode(msgspec.json.encode(wire.out(value)), type=wire.hint))


@given(EVENTS)
def test_events_come_back(event: Event) -> None:
    """Every event comes back equal, whatever it contains."""
    assert through_json(wire_of(Event), event) == event


@given(EFFECTS)
def test_effects_come_back(effect: Effect) -> None:
    """Every effect comes back equal, messages of every kind and the reasons for a choice included."""
    back = through_json(wire_of(Effect), effect)
    assert back == effect
    assert getattr(back, "choice", None) == getattr(effect, "choice", None)  # no part of the comparison above


@pytest.mark.parametrize("union", [Event, Effect])
def test_unions_are_written_whole(union: Any) -> None:
    """Each member of the closed unions has its own form, under its class's name."""
    schema = msgspec.json.schema(wire_of(union).hint)
    assert set(schema["discriminator"]["mapping"]) == {member.__name__ for member in typing.get_args(union)}


def test_not_a_number_comes_back() -> None:
    """NaN, which equals nothing, comes back as NaN."""
    sent = SendMessage("c", "a", "b", Ask("a1", "r", 3, "drain", math.nan))
    assert math.isnan(through_json(wire_of(Effect), sent).message.load)


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"RequestFinished","cause":"c","request_id":"r","output_tokens":1,"prompt":"hello"}',
        b'{"type":"RequestFinished","cause":"c","request_id":"r"}',
        b'{"type":"RequestStarted","cause":"c"}',
        b'{"type":"MigrationEnded","cause":"c","migration_id":"m","request_id":"r","source_id":"a","target_id":"b","outcome":"gone"}',
    ],
)
def test_what_is_no_event_is_refused(line: bytes) -> None:
    """Unknown fields, missing fields, unknown kinds and unknown words are refused."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(line, type=wire_of(Event).hint)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_come_back(name: str) -> None:
    """Options of a policy come back equal, and make it."""
    make = POLICIES[name].make
    written = msgspec.json.encode(options_out(make, OPTIONS[name]))
    back = options_back(make, msgspec.json.decode(written))
    assert back == OPTIONS[name]
    make(**back)


@pytest.mark.parametrize("objective", [BalancedLatency(0.25), WeightedLatency(0.5, 3.0), SloAttainment(2.0, 0.1)])
def test_objectives_come_back(objective: BuiltInObjective) -> None:
    """Built-in objectives come back equal, with their weights."""
    assert through_json(wire_of(Objective), objective) == objective


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_option_has_a_form(name: str) -> None:
    """Every option of every policy can be written, except functions (a test's own planner)."""
    for option, hint in typing.get_type_hints(POLICIES[name].make.__init__).items():
        if option not in {"return", "planner"}:
            wire_of(hint)


def test_functions_are_refused() -> None:
    """An option that is a function cannot be written, and says so."""
    with pytest.raises(TypeError, match="cannot be logged"):
        options_out(POLICIES["cascade"].make, {"planner": print})


@given(st.sampled_from([{"speed": 1}, {"migrate": "yes"}, {"interval_s": None}]))
def test_wrong_options_are_refused(written: dict[str, Any]) -> None:
    """Options that the policy lacks, or of the wrong type, are refused by name."""
    with pytest.raises((TypeError, ValueError), match=next(iter(written))):
        options_back(POLICIES["llumnix"].make, written)
