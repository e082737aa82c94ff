"""Drives a policy: one event at a time, its effects at once, its timer armed."""

import asyncio
from collections import deque
from collections.abc import Callable

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event, TimerFired
from cascadeinfer.core.policy import Policy


class PolicyDriver:
    """
    The only caller of a policy.

    Effects are carried out by `perform` in the order given. Events that arise on the way (an effect can fail at once) wait their turn.
    """

    def __init__(self, policy: Policy, perform: Callable[[Effect], None], clock: Callable[[], float]) -> None:
        """
        Args:
            policy: The strategy.
            perform: Carries one effect out; must not block.
            clock: The time in seconds; the policy's timers are on it.
        """
        self._policy = policy
        self._perform = perform
        self._clock = clock
        self._events: deque[Event] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None

    def emit(self, event: Event) -> None:
        """Hand an event to the policy, now or after those before it."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                for effect in self._policy.handle(self._events.popleft(), self._clock()):
                    self._perform(effect)
        finally:
            self._busy = False
        self._arm()

    def stop(self) -> None:
        """No more timers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.stop()
        at_s = self._policy.next_timer_s()
        if at_s is not None:
            delay_s = max(0.0, at_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.emit, TimerFired("timer"))
