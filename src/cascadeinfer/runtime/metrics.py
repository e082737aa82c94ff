"""
Prometheus metrics of the runtime. Names, labels and meaning are in `docs/metrics.md`.

Counters and histograms are counted as things happen; most gauges are read from the runtime when Prometheus asks
(`gauges.py`). Several front-end processes share their counters, histograms and the few gauges made here through
`prometheus_client`'s multiprocess mode. vLLM's own metrics carry the instance as their label `engine` (its number, the
same as our label `instance`).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cascadeinfer.core.types import LengthRange
from cascadeinfer.runtime.gauges import FleetGauges, families_of

PAUSE_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TTFT_BUCKETS_S: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
TPOT_BUCKETS_S: Final = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
E2E_BUCKETS_S: Final = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
LENGTH_EDGES_TOKENS: Final = (512, 2048, 8192, 32_768)
"""Few, because each class has a series per bucket; fixed, so that a new plan does not break a series."""
LENGTH_CLASSES: Final = tuple(
    str(LengthRange(*bounds))
    for bounds in [*zip((0, *LENGTH_EDGES_TOKENS), LENGTH_EDGES_TOKENS, strict=False), (LENGTH_EDGES_TOKENS[-1],)]
)
"""Values of the label `length`: half-open ranges of tokens, such as `0-512`."""


def length_class(n_tokens: int) -> str:
    """The class of a length in tokens."""
    return LENGTH_CLASSES[bisect_right(LENGTH_EDGES_TOKENS, n_tokens)]


class RuntimeMetrics(Collector):
    """Everything the runtime counts."""

    def __init__(
        self,
        registry: CollectorRegistry,
        read: Callable[[], FleetGauges],
        dropped_events: Callable[[], int] = lambda: 0,
        event_log_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            registry: Where to register; vLLM's `/metrics` shows the process's default registry.
            read: Called at every scrape.
            dropped_events: Events missing from the event log because its writer fell behind or the disk failed.
            event_log_failed: Whether a requested event log is no longer written.
        """
        self._registry = registry
        self._read = read
        self._dropped_events = dropped_events
        self._event_log_failed = event_log_failed
        self._desired: Gauge | None = None
        self._shown = 0, 0, 0
        self.requests = Counter("cascadeinfer_requests", "Requests that ended, by how.", ["outcome"], registry=registry)
        self.migrations = Counter(
            "cascadeinfer_migrations",
            "Migrations that ended, by outcome, reason and detail.",
            ["outcome", "reason", "detail"],
            registry=registry,
        )
        self.pause = Histogram(
            "cascadeinfer_migration_pause_seconds",
            "Time between a moved request's last token at the source and its first at the target.",
            ["outcome"],
            buckets=PAUSE_BUCKETS_S,
            registry=registry,
        )
        self.pinned_requests = Counter(
            "cascadeinfer_pinned_requests",
            "Requests that may not migrate because their state would not survive it, by reason.",
            ["reason"],
            registry=registry,
        )
        self.recovered = Counter(
            "cascadeinfer_recovered_requests",
            "Requests that went on elsewhere after their instance was lost; exact=no when sampling state was lost.",
            ["exact"],
            registry=registry,
        )
        self.shared = Counter(
            "cascadeinfer_shared_requests",
            "Requests that a backlog of prompts in their stage sent to another instance.",
            registry=registry,
        )
        self._count_trouble(registry)
        self._count_latency(registry)
        registry.register(self)

    def _count_trouble(self, registry: CollectorRegistry) -> None:
        """Counters that an operator would alert on."""
        self.suspicions = Counter(
            "cascadeinfer_suspicions",
            "Times that an instance's report was overdue, so that nothing new went there while another answered.",
            registry=registry,
        )
        self.withdrawn = Counter(
            "cascadeinfer_withdrawn_requests",
            "Requests that waited at an instance whose report was overdue and went elsewhere.",
            registry=registry,
        )
        self.poison_requests = Counter(
            "cascadeinfer_poison_requests",
            "Requests that were ended because instances died under them.",
            registry=registry,
        )
        self.suspected_requests = Gauge(
            "cascadeinfer_suspected_requests",
            "Requests under which an instance has died and that have no token since.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.policy_failures = Counter(
            "cascadeinfer_policy_failures",
            "Events at which the policy raised an exception, by event; see the server's log.",
            ["event"],
            registry=registry,
        )
        self.plan_failures = Counter(
            "cascadeinfer_plan_failures",
            "Plans that a fault prevented: the stages stayed as they were; see the server's log.",
            registry=registry,
        )

    def _count_latency(self, registry: CollectorRegistry) -> None:
        """What clients wait for, and what is under way."""
        self.ttft = Histogram(
            "cascadeinfer_request_ttft_seconds",
            "From a request's arrival to its first token, by prompt length.",
            ["length"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "cascadeinfer_request_tpot_seconds",
            "Mean time between a finished request's tokens, pauses included, by final length.",
            ["length"],
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        self.e2e = Histogram(
            "cascadeinfer_request_e2e_seconds",
            "From a finished request's arrival to its last token, by final length.",
            ["length"],
            buckets=E2E_BUCKETS_S,
            registry=registry,
        )
        self.unplaced_requests = Gauge(
            "cascadeinfer_unplaced_requests",
            "Requests that wait in front of the instances.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.migrations_under_way = Gauge(
            "cascadeinfer_migrations_under_way",
            "Moves that have begun and not ended.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.parked_requests = Gauge(
            "cascadeinfer_parked_requests",
            "Requests that have their first token from a prefill instance and wait to be moved, or move.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def show(self, n_unplaced: int, n_migrations: int, n_parked: int) -> None:
        """Requests that wait for a place, moves under way, and parked requests; called at every event."""
        if self._shown != (n_unplaced, n_migrations, n_parked):
            self._shown = n_unplaced, n_migrations, n_parked
            self.unplaced_requests.set(n_unplaced)
            self.migrations_under_way.set(n_migrations)
            self.parked_requests.set(n_parked)

    def first_token(self, prompt_tokens: int, ttft_s: float) -> None:
        """A request has its first token."""
        self.ttft.labels(length_class(prompt_tokens)).observe(ttft_s)

    def finished(self, prompt_tokens: int, output_tokens: int, ttft_s: float, e2e_s: float) -> None:
        """A request has finished with at least one token; its times count from its arrival."""
        length = length_class(prompt_tokens + output_tokens)
        self.e2e.labels(length).observe(e2e_s)
        if output_tokens > 1:
            self.tpot.labels(length).observe((e2e_s - ttft_s) / (output_tokens - 1))

    def desire(self, n_instances: int) -> None:
        """
        Publish how many instances the load needs.

        The gauge is made here, because one that exists before it is known would show 0, in multiprocess mode for good.
        """
        if self._desired is None:
            self._desired = Gauge(
                "cascadeinfer_desired_instances",
                "Fewest instances with which the SLO is predicted to be kept at the observed load.",
                registry=self._registry,
                multiprocess_mode="livemax",
            )
        self._desired.set(n_instances)

    def collect(self) -> Iterable[Metric]:
        """Gauges per instance and per stage, read now."""
        yield from families_of(self._read())
        yield CounterMetricFamily(
            "cascadeinfer_event_log_dropped",
            "Events that are missing from the event log.",
            value=self._dropped_events(),
        )
        yield GaugeMetricFamily(
            "cascadeinfer_event_log_failed",
            "Whether nothing more is written to the event log that was asked for.",
            value=float(self._event_log_failed()),
        )

    def close(self) -> None:
        """Unregister everything, so that another runtime of this process can register."""
        for collector in (
            self, self.requests, self.migrations, self.pause, self.pinned_requests, self.recovered, self.shared,
            self.policy_failures, self.plan_failures, self.suspicions, self.withdrawn, self.poison_requests,
            self.suspected_requests, self.ttft, self.tpot, self.e2e, self.unplaced_requests, self.migrations_under_way,
            self.parked_requests,
        ):  # fmt: skip
            self._registry.unregister(collector)
        if self._desired is not None:
            self._registry.unregister(self._desired)
