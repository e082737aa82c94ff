"""
vLLM's metrics for instances that come and go.

vLLM's `PrometheusStatLogger` is made for a fixed set of engines. Ours keeps one per instance, and all of them write to
the same metric families: the classes through which vLLM creates its metrics, attributes that are meant to be replaced,
are replaced by ones that return the existing family. When an instance is removed, its gauges are set to zero and its
series dropped. (In Prometheus' multiprocess mode series cannot be dropped: counters then stay as they were, gauges at
zero.) The same holds for vLLM's log lines with statistics.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics import loggers
from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter, PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine

Family: TypeAlias = Counter | Gauge | Histogram


class _Sharing:
    """Called like a metric class; creates a family once and returns the same one from then on."""

    def __init__(self, metric_class: type[Family], families: dict[str, Family]) -> None:
        self._metric_class = metric_class
        self._families = families

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Family:
        if name not in self._families:
            self._families[name] = self._metric_class(name, *args, **kwargs)
        return self._families[name]


def _sharing_logger_class(families: dict[str, Family]) -> type[PrometheusStatLogger]:
    """A subclass of vLLM's logger that takes its metrics, and those of its parts, from these families."""
    classes = {
        "_gauge_cls": _Sharing(Gauge, families),
        "_counter_cls": _Sharing(Counter, families),
        "_histogram_cls": _Sharing(Histogram, families),
    }
    parts = {
        name: type(part.__name__, (part,), {k: v for k, v in classes.items() if hasattr(part, k)})
        for name, part in vars(PrometheusStatLogger).items()
        if name in {"_spec_decoding_cls", "_kv_connector_cls", "_ec_connector_cls", "_perf_metrics_cls"}
    }
    return type("SharingStatLogger", (PrometheusStatLogger,), {**classes, **parts})


@contextlib.contextmanager
def _nothing_unregistered() -> Iterator[None]:
    """Keep a new logger from unregistering all of vLLM's metrics, which only the first one may do."""
    original = loggers.unregister_vllm_metrics
    loggers.unregister_vllm_metrics = lambda: None
    try:
        yield
    finally:
        loggers.unregister_vllm_metrics = original


class ElasticStatLogger(PrometheusStatLogger):
    """vLLM's Prometheus metrics for the current instances. See the module header."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        """Made by vLLM's `StatLoggerManager`; instead of the base class's metrics it has one logger per instance."""
        loggers.unregister_vllm_metrics()
        self.vllm_config = vllm_config
        self._families: dict[str, Family] = {}
        self._logger_class = _sharing_logger_class(self._families)
        self._loggers: dict[int, PrometheusStatLogger] = {}
        for index in engine_indexes or [0]:
            self.add(index)

    def add(self, index: int) -> None:
        """An instance joins; one that was here before continues its series."""
        if index not in self._loggers:
            with _nothing_unregistered():
                self._loggers[index] = self._logger_class(self.vllm_config, [index])

    def remove(self, index: int) -> None:
        """An instance is gone for good."""
        logger = self._loggers.pop(index, None)
        if logger is None:
            return
        logger.record(SchedulerStats(), None, engine_idx=index)
        for family in self._families.values():
            if "engine" in family._labelnames:  # noqa: SLF001 - the one way to ask a family for its labels
                family.remove_by_labels({"engine": str(index)})

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Record a step's statistics; those of a removed instance are dropped."""
        if (logger := self._loggers.get(engine_idx)) is not None:
            logger.record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    def record_admission_rejection(self, reason: str) -> None:
        """Counted once, for no particular instance."""
        for logger in list(self._loggers.values())[:1]:
            logger.record_admission_rejection(reason)

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """All instances sleep or wake together."""
        for logger in self._loggers.values():
            logger.record_sleep_state(sleep, level)

    def log_engine_initialized(self) -> None:
        """Publish the cache configuration."""
        for logger in self._loggers.values():
            logger.log_engine_initialized()


class StatsFollower:
    """Keeps the loggers of an `AsyncLLM` in step with the fleet. See `cascadeinfer.runtime.fleet.FleetWatcher`."""

    def __init__(self, manager: StatLoggerManager, vllm_config: VllmConfig, instances: list[Engine]) -> None:
        """
        Args:
            manager: The loggers of the `AsyncLLM`, made for these instances.
            vllm_config: The configuration that loggers are made with.
            instances: The instances at the start.
        """
        self._manager = manager
        self._vllm_config = vllm_config
        self._index_of: dict[InstanceId, int] = {i.instance_id: i.index for i in instances}

    def instance_joins(self, engine: Engine) -> None:
        """See FleetWatcher."""
        if engine.instance_id in self._index_of:
            return
        index = self._index_of[engine.instance_id] = engine.index
        for logger in self._manager.stat_loggers:
            if isinstance(logger, ElasticStatLogger):
                logger.add(index)
            elif isinstance(logger, PerEngineStatLoggerAdapter):
                made = logger.per_engine_stat_loggers
                made[index] = type(next(iter(made.values())))(self._vllm_config, index)

    def instance_left(self, instance_id: InstanceId) -> None:
        """See FleetWatcher."""
        index = self._index_of.pop(instance_id, None)
        if index is None:
            return
        for logger in self._manager.stat_loggers:
            if isinstance(logger, ElasticStatLogger):
                logger.remove(index)
            elif isinstance(logger, PerEngineStatLoggerAdapter) and len(logger.per_engine_stat_loggers) > 1:
                del logger.per_engine_stat_loggers[index]
