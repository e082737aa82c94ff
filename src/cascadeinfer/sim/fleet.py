"""
The instances of a cluster: when they step, report, crash, drain and come back.

An instance is a heap event only where a decision is due (its wake-up); every access first brings it up to the current
time. A crashed instance stays in the books, silent, until `detect_s` have passed: what is sent to it meanwhile is lost
with it.
"""

import math
from typing import Protocol

from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.kind import InstanceKind, InstanceTerms
from cascadeinfer.core.types import InstanceId
from cascadeinfer.sim.faults import Crash
from cascadeinfer.sim.instance import SimInstance
from cascadeinfer.sim.kernel import Kernel, Priority
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.sim.steps import StepEnd


class Listener(Protocol):
    """Notified of what happens to instances."""

    def instance_joined(self, instance: SimInstance) -> None:
        """It is ready."""
        ...

    def instance_stepped(self, instance: SimInstance, end: StepEnd) -> None:
        """A step with a decision at its end is done; the next has begun."""
        ...

    def instance_reported(self, instance: SimInstance, report: InstanceReport) -> None:
        """It reported its load."""
        ...

    def instance_crashed(self, instance: SimInstance) -> None:
        """It has died, not yet detected."""
        ...

    def instance_lost(self, instance: SimInstance) -> None:
        """Its death has been detected; the listener takes it out of the books."""
        ...

    def instance_draining(self, instance: SimInstance) -> None:
        """It takes no new requests."""
        ...


class Fleet:
    """
    All instances.

    Attributes:
        instances: Present instances, including crashed ones until the crash is detected.
        numbers: Index of every instance that may ever exist.
        draining: Instances that leave once they are empty.
        tokens_of_the_lost: Output tokens delivered by instances that are gone.
    """

    def __init__(self, kernel: Kernel, config: SimConfig, listener: Listener, *, unit_tokens: int) -> None:
        """
        Args:
            kernel: The clock.
            config: The cluster's configuration.
            listener: Notified of what happens.
            unit_tokens: Tokens that one prefix hash covers; 0 without prefix caching.
        """
        self.instances: dict[InstanceId, SimInstance] = {}
        self.numbers = {instance_id: number for number, instance_id in enumerate(instance_ids(config.instances))}
        self.draining: set[InstanceId] = set()
        self.tokens_of_the_lost = 0
        self._kernel = kernel
        self._config = config
        self._listener = listener
        self._unit_tokens = unit_tokens
        self._terms: dict[InstanceId, InstanceTerms] = {}
        self._schedule()

    def _schedule(self) -> None:
        faults = self._config.faults
        late = {join.instance_id for join in faults.late_joins}
        for instance_id, number in self.numbers.items():
            if instance_id not in late:
                self._kernel.at(0.0, Priority.FAULT, self._join, instance_id, order=number)
        for join in faults.late_joins:
            self._kernel.at(join.at_s, Priority.FAULT, self._join, join.instance_id)
        for crash in faults.crashes:
            self._kernel.at(crash.at_s, Priority.FAULT, self._crash, crash)
        for drain in faults.drains:
            self._kernel.at(drain.at_s, Priority.FAULT, self._drain, drain.instance_id)

    def instance(self, instance_id: InstanceId) -> SimInstance | None:
        """An instance, brought up to the current time; None when it is gone."""
        instance = self.instances.get(instance_id)
        if instance is not None:
            instance.catch_up(self._kernel.settled_s(instance.number))
        return instance

    def touched(self, instance: SimInstance) -> None:
        """Make sure that the instance is woken in time."""
        wake_s = instance.wake_s()
        if wake_s != instance.scheduled_wake_s:
            instance.scheduled_wake_s = wake_s
            instance.wake_version += 1
            if wake_s < math.inf:
                what = (instance, instance.wake_version)
                self._kernel.at(wake_s, Priority.STEP, self._step_ended, what, order=instance.number)

    def _step_ended(self, what: tuple[SimInstance, int]) -> None:
        instance, version = what
        if version != instance.wake_version or not instance.alive:
            return
        instance.scheduled_wake_s = math.nan
        end = instance.step_ended(self._kernel.now_s)
        self.touched(instance)
        self._listener.instance_stepped(instance, end)

    def _join(self, instance_id: InstanceId) -> None:
        if instance_id in self.instances:
            return
        number = self.numbers[instance_id]
        what = self._config.kind_of(instance_id)
        capacity = self.kind_of(instance_id).capacity
        instance = SimInstance(
            instance_id,
            number,
            capacity,
            what.step_model.coefficients(),
            blocks_per_unit=self._unit_tokens // capacity.block_size_tokens,
            fast_forward=self._config.fast_forward,
        )
        self.instances[instance_id] = instance
        self._listener.instance_joined(instance)
        # Instances take turns: each reports at its own phase of the interval.
        first_s = self._kernel.now_s + self._config.report_interval_s * (number + 1) / len(self.numbers)
        self._kernel.at(first_s, Priority.REPORT, self._report, instance, order=number)

    def _report(self, instance: SimInstance) -> None:
        if not instance.alive:
            return
        next_s = self._kernel.now_s + self._config.report_interval_s
        self._kernel.at(next_s, Priority.REPORT, self._report, instance, order=instance.number)
        instance.catch_up(self._kernel.now_s)
        self._listener.instance_reported(instance, instance.report())

    def _crash(self, crash: Crash) -> None:
        instance = self.instance(crash.instance_id)
        if instance is None or not instance.alive:
            return
        instance.crash()
        self._listener.instance_crashed(instance)
        found_s = self._kernel.now_s + self._config.detect_s
        self._kernel.at(found_s, Priority.FAULT, self._lose, instance)
        if crash.back_after_s is not None:
            back_s = max(self._kernel.now_s + crash.back_after_s, found_s)
            self._kernel.at(back_s, Priority.FAULT, self._join, crash.instance_id)

    def _lose(self, instance: SimInstance) -> None:
        self.draining.discard(instance.instance_id)
        self._listener.instance_lost(instance)

    def kind_of(self, instance_id: InstanceId) -> InstanceKind:
        """What an instance is, with the terms that it has been given."""
        kind = self._config.kind_of(instance_id).kind
        terms = self._terms.get(instance_id)
        return kind if terms is None else kind.with_terms(terms)

    def assign(self, instance_id: InstanceId, terms: InstanceTerms) -> InstanceKind | None:
        """Give an instance other terms, from its next step on; None: it is not there, and has them when it is back."""
        self._terms[instance_id] = terms
        instance = self.instance(instance_id)
        if instance is None:
            return None
        kind = self.kind_of(instance_id)
        instance.capacity = instance.scheduler.capacity = kind.capacity
        return kind

    def remove(self, instance: SimInstance) -> None:
        """Take a lost instance out of the books."""
        del self.instances[instance.instance_id]
        self.tokens_of_the_lost += instance.scheduler.tokens_out

    def _drain(self, instance_id: InstanceId) -> None:
        instance = self.instance(instance_id)
        if instance is not None and instance.alive:
            self.draining.add(instance_id)
            self._listener.instance_draining(instance)

    def leave(self, instance: SimInstance) -> None:
        """A drained instance shuts down cleanly; its loss is known at once."""
        instance.crash()
        self._lose(instance)
