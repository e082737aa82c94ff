"""A step as an engine measured it: what it computed and how long it took."""

from dataclasses import dataclass

from cascadeinfer.core.cost.latency import BatchFeatures


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step of an engine, timed by the engine."""

    batch: BatchFeatures
    step_s: float
