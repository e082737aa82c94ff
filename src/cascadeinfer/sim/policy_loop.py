"""Drives a policy in virtual time: one event after the other, its effects at once, its timer."""

from collections import deque
from collections.abc import Callable

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event, TimerFired
from cascadeinfer.core.policy import Policy
from cascadeinfer.sim.kernel import Kernel, Priority

Observer = Callable[[float, Event, list[Effect]], None]
"""Sees each event with its time and the effects it led to."""


class PolicyLoop:
    """Events that arise while one is handled are queued, so the policy sees one at a time."""

    def __init__(
        self, policy: Policy, kernel: Kernel, carry_out: Callable[[Effect], None], observer: Observer | None
    ) -> None:
        """
        Args:
            policy: The strategy; this object is its only driver.
            kernel: The clock.
            carry_out: Carries one effect out, at once.
            observer: Called after each event.
        """
        self._policy = policy
        self._kernel = kernel
        self._carry_out = carry_out
        self._observer = observer
        self._inbox: deque[Event] = deque()
        self._handling = False
        self._timer_s: float | None = None
        self._timer_version = 0

    def emit(self, event: Event) -> None:
        """Hand an event to the policy and carry its effects out, then those that arose meanwhile."""
        if self._handling:
            self._inbox.append(event)
            return
        self._handling = True
        now_s = self._kernel.now_s
        waiting: Event | None = event
        while waiting is not None:
            effects = self._policy.handle(waiting, now_s)
            if self._observer is not None:
                self._observer(now_s, waiting, effects)
            for effect in effects:
                self._carry_out(effect)
            waiting = self._inbox.popleft() if self._inbox else None
        self._handling = False
        timer_s = self._policy.next_timer_s()
        if timer_s != self._timer_s:
            self._timer_s = timer_s
            self._timer_version += 1
            if timer_s is not None:
                self._kernel.at(max(timer_s, now_s), Priority.TIMER, self._fire, self._timer_version)

    def _fire(self, version: int) -> None:
        if version == self._timer_version:
            self._timer_s = None
            self.emit(TimerFired("timer"))
