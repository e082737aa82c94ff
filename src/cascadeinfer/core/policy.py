"""
The heart of the design: a policy is a deterministic state machine from events to effects.

The simulator and the runtime drive the same object. For the same sequence of (event, now_s) a policy returns the same
effects: no clock, no global randomness, no dependence on set order.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event


@dataclass(frozen=True, slots=True)
class NextPlan:
    """
    What the next plan of a policy needs; for operators.

    Attributes:
        due_s: When it is made, on the shell's clock; None before the first report.
        requests: Finished requests seen, the older ones counting less.
        needed_requests: How many a plan needs.
        needed_gain: The gain over the stages in force that a new plan needs, given that many requests; 0.06 is 6 %.
        last: What became of the last attempt; empty before the first.
    """

    due_s: float | None
    requests: float
    needed_requests: float
    needed_gain: float
    last: str


@runtime_checkable
class PlansAhead(Protocol):
    """A policy that makes plans and can say what the next one needs."""

    def next_plan(self) -> NextPlan | None:
        """What the next plan needs; None while the policy makes none. Changes nothing."""
        ...


class Policy(Protocol):
    """A scheduling strategy."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """
        Take one event and say what to do.

        Args:
            event: What happened. Events about ids the policy does not know (any more) are ignored, not errors: a report
                can cross a finish.
            now_s: The shell's clock in seconds; never decreases from call to call.

        Returns:
            Effects in the order in which the shell starts them.

        """
        ...

    def next_timer_s(self) -> float | None:
        """When (on the same clock) the policy wants a `TimerFired`, or None. Asked after each `handle`."""
        ...
