"""
The heart of the design: a policy is a deterministic state machine from events to effects.

The simulator and the runtime drive the same object. For the same sequence of (event, now_s) a policy returns the same
effects: no clock, no global randomness, no dependence on set order.
"""

from typing import Protocol

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event


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
