"""
Drives a policy: delivers one event at a time, carries its effects out at once and arms its timer.

A policy that raises has a bug, which must not hurt the source of the event: the exception is logged with the event, the
resulting effects are dropped, and the `failed` callback takes care of the requests (`recovery.py`). An effect that
cannot be started is treated the same way.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event, TimerFired
from cascadeinfer.core.policy import Policy

logger = logging.getLogger(__name__)

TRACEBACKS: Final = 5
"""Failures of one kind that are logged in full; then every `FURTHER`-th: a policy may fail at every report."""
FURTHER: Final = 1000


class Observer(Protocol):
    """Sees each event with its time and effects, or the name of the exception if the policy raised."""

    def __call__(self, now_s: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:
        """Must not block, must not raise."""
        ...


class PolicyDriver:
    """
    The only caller of a policy.

    `perform` carries effects out in the order given. Events that arise meanwhile (an effect can fail at once) are
    queued.
    """

    def __init__(
        self,
        policy: Policy,
        perform: Callable[[Effect], None],
        clock: Callable[[], float],
        *,
        failed: Callable[[Event], None] = lambda _: None,
        observer: Observer | None = None,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            policy: The strategy.
            perform: Carries one effect out; must not block.
            clock: The time in seconds; the policy's timers use it.
            failed: Called with each event at which the policy failed, after it.
            observer: Sees everything, before the effects are carried out.
            settled: Called whenever the effects of all events so far have been carried out.
        """
        self._policy = policy
        self._perform = perform
        self._clock = clock
        self._failed = failed
        self._observer = observer
        self._settled = settled
        self._events: deque[Event] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._failures: Counter[tuple[str, str]] = Counter()

    def emit(self, event: Event) -> None:
        """Deliver an event to the policy, after any that are queued."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._busy = False
        self._settled()
        self._arm()

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _handle(self, event: Event) -> None:
        now_s = self._clock()
        failure: str | None = None
        effects: Sequence[Effect] = ()
        try:
            effects = self._policy.handle(event, now_s)
        except Exception as error:  # noqa: BLE001 - a policy may raise anything
            failure = type(error).__name__
            self._complain(event, "the policy failed at", error)
        if self._observer is not None:
            self._observer(now_s, event, effects, failure)
        for effect in effects:
            try:
                self._perform(effect)
            except Exception as error:  # noqa: BLE001 - an effect that makes no sense, or our own bug
                failure = type(error).__name__
                self._complain(event, f"{effect} cannot be carried out, which the policy wants because of", error)
        if failure is not None:
            self._failed(event)

    def _complain(self, event: Event, what: str, error: Exception) -> None:
        kind = type(event).__name__, type(error).__name__
        self._failures[kind] += 1
        count = self._failures[kind]
        if count <= TRACEBACKS or count % FURTHER == 0:
            logger.error("%s %s (no. %d of this kind); nothing is done about it", what, event, count, exc_info=error)

    def _arm(self) -> None:
        self.stop()
        try:
            at_s = self._policy.next_timer_s()
        except Exception as error:  # noqa: BLE001 - a policy may raise anything
            timer = TimerFired("timer")
            self._complain(timer, "the policy failed to name the time of", error)
            self._failed(timer)
            return
        if at_s is not None:
            delay_s = max(0.0, at_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.emit, TimerFired("timer"))
