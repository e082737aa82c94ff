"""
Prometheus metrics of the runtime. Names, labels and meaning are in `docs/metrics.md`.

Counters and histograms are counted as things happen; gauges are read from the runtime when Prometheus asks. vLLM's own
metrics carry the instance as their label `engine` (its number, the same as our label `instance`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cascadeinfer.core.types import InstanceId

PAUSE_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class InstanceGauges:
    """
    One instance at scrape time.

    Attributes:
        stage: Number of its stage, empty when it serves none.
        kv_usage: Share of its KV blocks in use, 0 to 1.
        broken_pairs: Instances that are up and with which it has not shaken hands.
    """

    instance_id: InstanceId
    stage: str
    up: bool
    suspect: bool
    running: int
    waiting: int
    kv_usage: float
    kv_pulls: int
    failed_pulls: int
    pinned: int
    restarts: int
    held_blocks: Mapping[str, int] = field(default_factory=dict)
    broken_pairs: int = 0


class RuntimeMetrics(Collector):
    """Everything the runtime counts."""

    def __init__(
        self,
        registry: CollectorRegistry,
        read: Callable[[], list[InstanceGauges]],
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

    def collect(self) -> Iterable[Metric]:
        """Gauges per instance and per stage, read now."""
        gauges = self._read()
        fields: tuple[tuple[str, str, Callable[[InstanceGauges], float]], ...] = (
            ("up", "Whether the instance is up.", lambda g: float(g.up)),
            ("suspect", "Whether its report is overdue.", lambda g: float(g.suspect)),
            ("running", "Requests running.", lambda g: g.running),
            ("waiting", "Requests waiting.", lambda g: g.waiting),
            ("kv_usage", "Share of KV blocks in use.", lambda g: g.kv_usage),
            ("kv_pulls", "Requests whose KV cache it has pulled since it started.", lambda g: g.kv_pulls),
            ("failed_pulls", "Pulls that failed since it started.", lambda g: g.failed_pulls),
            ("pinned", "Cut requests whose blocks are pinned.", lambda g: g.pinned),
            ("restarts", "Times it was restarted.", lambda g: g.restarts),
            (
                "broken_pairs",
                "Instances that are up and that it cannot exchange KV cache with.",
                lambda g: g.broken_pairs,
            ),
        )
        for name, text, value_of in fields:
            family = GaugeMetricFamily(f"cascadeinfer_instance_{name}", text, labels=["instance", "stage"])
            for gauge in gauges:
                family.add_metric([gauge.instance_id, gauge.stage], value_of(gauge))
            yield family
        yield self._held_blocks(gauges)
        yield from self._by_stage(gauges)
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

    @staticmethod
    def _held_blocks(gauges: list[InstanceGauges]) -> Metric:
        family = GaugeMetricFamily(
            "cascadeinfer_instance_held_blocks",
            "KV blocks that no request runs or waits with, by what holds them.",
            labels=["instance", "stage", "reason"],
        )
        for gauge in gauges:
            for reason, n_blocks in gauge.held_blocks.items():
                family.add_metric([gauge.instance_id, gauge.stage, reason], n_blocks)
        return family

    @staticmethod
    def _by_stage(gauges: list[InstanceGauges]) -> Iterable[Metric]:
        stages = sorted({g.stage for g in gauges})
        running = GaugeMetricFamily("cascadeinfer_stage_running", "Requests running in a stage.", labels=["stage"])
        waiting = GaugeMetricFamily("cascadeinfer_stage_waiting", "Requests waiting in a stage.", labels=["stage"])
        usage = GaugeMetricFamily("cascadeinfer_stage_kv_usage", "Mean share of KV blocks in use.", labels=["stage"])
        for stage in stages:
            members = [g for g in gauges if g.stage == stage]
            running.add_metric([stage], sum(g.running for g in members))
            waiting.add_metric([stage], sum(g.waiting for g in members))
            usage.add_metric([stage], sum(g.kv_usage for g in members) / len(members))
        yield from (running, waiting, usage)

    def close(self) -> None:
        """Unregister everything, so that another runtime of this process can register."""
        for collector in (
            self, self.requests, self.migrations, self.pause, self.pinned_requests, self.recovered, self.shared,
            self.policy_failures, self.plan_failures, self.suspicions, self.withdrawn, self.poison_requests,
            self.suspected_requests,
        ):  # fmt: skip
            self._registry.unregister(collector)
