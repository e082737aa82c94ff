"""What `/metrics` exports of ours: the names of all series, as Prometheus reads them, with their labels."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.links import Link
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.runtime.gauges import FleetGauges, InstanceGauges
from cascadeinfer.runtime.metrics import RuntimeMetrics

GAUGES = InstanceGauges(
    "0", "0", True, False, 0, 0, 0.0, 0, 0, 0, 0, {"pins": 0}, kind=InstanceKind(InstanceCapacity(10, 16, 8, 64))
)

LINK = Link("x", "x", 50_000.0, 2, is_far=False)


def registry_with_everything() -> CollectorRegistry:
    """A registry in which every metric of the runtime has a value, and every label one value."""
    registry = CollectorRegistry()
    metrics = RuntimeMetrics(registry, lambda: FleetGauges([GAUGES], StageLayout.single(("0",)), 1.0, [LINK]))
    metrics.desire(2)
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase) and metric._labelnames:
            metric.labels(*["x" for _ in metric._labelnames])
    return registry


def exported_series() -> dict[str, set[str]]:
    """Labels by the name of the series, those of histograms included (`_bucket`, `_sum`, `_count`)."""
    text = generate_latest(registry_with_everything()).decode()
    return {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    }
