"""Several front-end processes in the simulator: each decides for its own requests, and none is lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascadeinfer.core.effects import Dispatch, Effect, MigrationReason, PublishLayout, SendMessage, StartMigration
from cascadeinfer.core.events import (
    Event,
    InstanceLost,
    InstanceReport,
    InstanceReported,
    LayoutAnnounced,
    MessageReceived,
    RequestArrived,
    RequestFinished,
    TimerFired,
    WorkloadSeen,
)
from cascadeinfer.core.events import MigrationOutcome as Outcome
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.evaluation.front_ends import SUMMARY_S, SeveralFrontEnds
from cascadeinfer.evaluation.runs import RunSpec, run_once
from cascadeinfer.evaluation.setting import Setting, load_setting
from cascadeinfer.frontend.processes import follower
from cascadeinfer.results.summary import Slo


class Scripted:
    """
    A policy that notes what it hears and does what it is told.

    Attributes:
        heard: The events, in order.
        does: Effects of the next event.
        timer_s: When it wants to be woken.
    """

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.does: list[Effect] = []
        self.timer_s: float | None = None

    def handle(self, event: Event, _: float) -> list[Effect]:
        """See Policy."""
        self.heard.append(event)
        done, self.does = self.does, []
        return done

    def next_timer_s(self) -> float | None:
        """See Policy."""
        return self.timer_s


@pytest.fixture
def policies() -> list[Scripted]:
    """Of three processes."""
    return [Scripted(), Scripted(), Scripted()]


@pytest.fixture
def together(policies: list[Scripted]) -> SeveralFrontEnds:
    """The three processes."""
    return SeveralFrontEnds(policies[0], policies[1:])


def arrival(request_id: str) -> RequestArrived:
    """A request."""
    return RequestArrived("c", request_id, 100, 50)


def test_requests_go_in_turn_and_their_events_to_their_owner(
    together: SeveralFrontEnds, policies: list[Scripted]
) -> None:
    """Nobody else hears of them."""
    for number in range(4):
        together.handle(arrival(f"r{number}"), 0.0)
    together.handle(RequestFinished("c", "r1", 7), 0.1)
    names = [[event.request_id for event in policy.heard] for policy in policies]  # type: ignore[union-attr]
    assert names == [["r0", "r3"], ["r1", "r1"], ["r2"]]


def test_the_load_of_others_has_no_names(together: SeveralFrontEnds, policies: list[Scripted]) -> None:
    """Every request is load for all, and known to one."""
    for number in range(3):
        together.handle(arrival(f"r{number}"), 0.0)
    report = InstanceReport(("r0", "r2"), (110, 120), ("r1",), (130,), 9)
    together.handle(InstanceReported("c", "i", report), 0.1)
    seen: list[Any] = [policy.heard[-1] for policy in policies]
    assert [(each.report.running_ids, each.report.foreign_running_tokens) for each in seen] == [
        (("r0",), (120,)),
        ((), (110, 120)),
        (("r2",), (110,)),
    ]
    assert [(each.report.waiting_ids, each.report.foreign_waiting_tokens) for each in seen] == [
        ((), (130,)),
        (("r1",), ()),
        ((), (130,)),
    ]
    assert {(each.report.n_running, each.report.n_waiting) for each in seen} == {(2, 1)}
    together.handle(InstanceLost("c", "i", ("r0", "r1"), (110, 130)), 0.2)
    lost: list[Any] = [policy.heard[-1] for policy in policies]
    assert [(each.orphan_ids, each.orphan_tokens) for each in lost] == [(("r0",), (110,)), (("r1",), (130,)), ((), ())]


def test_moves_and_messages_come_back_to_who_began_them(together: SeveralFrontEnds, policies: list[Scripted]) -> None:
    """Two processes may use the same number for a move."""
    for policy in policies[:2]:
        message: Any = object()
        policy.does = [
            StartMigration("c", "m1", "r", "a", "b", MigrationReason.REBALANCE),
            SendMessage("c", "a", "b", message),
        ]
    effects = [effect for number in range(2) for effect in together.handle(arrival(f"r{number}"), 0.0)]
    started = [effect for effect in effects if isinstance(effect, StartMigration)]
    assert len({each.migration_id for each in started}) == 2
    sent: Any = [effect for effect in effects if isinstance(effect, SendMessage)]
    together.handle(started[1].ended(Outcome.MOVED, ""), 0.1)
    heard: Any = policies[1].heard[-1]
    assert (heard.migration_id, heard.outcome) == ("m1", Outcome.MOVED)
    together.handle(MessageReceived("c", "a", "b", sent[0].message), 0.2)
    heard = policies[0].heard[-1]
    assert isinstance(heard, MessageReceived)
    assert len(policies[2].heard) == 0


def test_one_plans_and_the_others_follow(together: SeveralFrontEnds, policies: list[Scripted]) -> None:
    """Its stages are announced to all at once; theirs are not published; it hears what they have seen."""
    layout = StageLayout.single(("a", "b"))
    policies[0].does = [PublishLayout("c", layout)]
    policies[1].does = [PublishLayout("c", layout)]
    effects = together.handle(arrival("r0"), 0.0)
    assert effects == [PublishLayout("c", layout)]
    assert [policy.heard for policy in policies[1:]] == [[LayoutAnnounced("c", layout)]] * 2
    together.handle(arrival("r1"), 0.0)
    together.handle(arrival("r2"), 0.0)
    together.handle(RequestFinished("c", "r1", 7), 0.1)
    together.handle(TimerFired("c"), SUMMARY_S)
    summaries = [event for event in policies[0].heard if isinstance(event, WorkloadSeen)]
    assert [(each.n_arrived, len(each.ended), len(each.unfinished)) for each in summaries] == [(1, 1, 0), (1, 0, 1)]
    assert summaries[0].ended[0].output_tokens == 7


def test_each_is_woken_when_it_asked_to_be(together: SeveralFrontEnds, policies: list[Scripted]) -> None:
    """Not before."""
    policies[1].timer_s, policies[2].timer_s = 0.1, 0.2
    assert together.next_timer_s() == 0.1
    together.handle(TimerFired("c"), 0.1)
    assert [len(policy.heard) for policy in policies] == [0, 1, 0]


def test_a_policy_that_dispatches_is_obeyed(together: SeveralFrontEnds, policies: list[Scripted]) -> None:
    """As it stands."""
    policies[0].does = [Dispatch("c", "r0", "a")]
    assert together.handle(arrival("r0"), 0.0) == [Dispatch("c", "r0", "a")]


@pytest.fixture(scope="module")
def setting() -> Setting:
    """Four instances and the sample trace."""
    return load_setting("h200-llama-3.1-8b", Path("sample"), 4)


@pytest.mark.parametrize("policy", ["cascade", "llumnix", "round_robin"])
def test_a_simulated_run(setting: Setting, policy: str) -> None:
    """The same requests end with the same lengths, whoever decides."""
    rate_rps = 0.7 * setting.one_stage_capacity_rps
    one = RunSpec(policy, rate_rps, 0, 400, Slo(2.0, 0.1), allow_overload=True)
    alone, three = (run_once(setting, spec).requests for spec in (one, replace(one, front_ends=3)))
    assert len(three.arrival_s) == 400
    assert np.array_equal(three.arrival_s, alone.arrival_s)
    assert np.array_equal(three.produced_tokens, alone.produced_tokens)
    assert np.isfinite(three.finish_s).all()


def test_processes_tell_as_often_as_those_of_a_server() -> None:
    """Else the simulation would stand for another server."""
    assert SUMMARY_S == follower.SUMMARY_S
