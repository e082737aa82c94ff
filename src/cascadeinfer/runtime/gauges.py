"""
What Prometheus reads from the runtime at a scrape: the instances, the stages in force, and how old they are.

The counters and histograms, which are counted as things happen, are in `metrics.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from prometheus_client.core import GaugeMetricFamily, Metric

from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.links import Link
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId
from cascadeinfer.runtime.instance_state import PHASES, State


@dataclass(frozen=True, slots=True)
class InstanceGauges:
    """
    One instance at scrape time.

    Attributes:
        stage: Number of its stage, empty when it serves none.
        kv_usage: Share of its KV blocks in use, 0 to 1.
        broken_pairs: Instances that are up and with which it has not shaken hands.
        phase: Where it is in its life, one of the values of `PHASES`.
        kind: What it is; None before its first start.
        build: Number of what it is started with.
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
    pulled_tokens: int = 0
    precopied_tokens: int = 0
    phase: str = "up"
    kind: InstanceKind | None = None
    build: int = 0


@dataclass(frozen=True, slots=True)
class FleetGauges:
    """
    All instances at scrape time.

    Attributes:
        layout: The stages in force; None before there are any.
        plan_age_s: Seconds since they were put in force; None likewise.
        links: How fast KV cache goes between nodes, as far as that is known.
    """

    instances: Sequence[InstanceGauges] = ()
    layout: StageLayout | None = None
    plan_age_s: float | None = None
    links: Sequence[Link] = ()


PER_INSTANCE: tuple[tuple[str, str, Callable[[InstanceGauges], float]], ...] = (
    ("up", "Whether the instance is up.", lambda g: float(g.up)),
    ("suspect", "Whether its report is overdue.", lambda g: float(g.suspect)),
    ("running", "Requests running.", lambda g: g.running),
    ("waiting", "Requests waiting.", lambda g: g.waiting),
    ("kv_usage", "Share of KV blocks in use.", lambda g: g.kv_usage),
    ("kv_pulls", "Requests whose KV cache it has pulled since it started.", lambda g: g.kv_pulls),
    ("pulled_tokens", "Tokens whose KV cache it has pulled since it started.", lambda g: g.pulled_tokens),
    (
        "precopied_tokens",
        "Tokens whose KV cache it had before the cut of their request, since it started.",
        lambda g: g.precopied_tokens,
    ),
    ("failed_pulls", "Pulls that failed since it started.", lambda g: g.failed_pulls),
    ("pinned", "Cut requests whose blocks are pinned.", lambda g: g.pinned),
    ("restarts", "Times it was restarted.", lambda g: g.restarts),
    ("build", "Number of the engine options that it is started with; 0 those of the server.", lambda g: g.build),
    ("broken_pairs", "Instances that are up and that it cannot exchange KV cache with.", lambda g: g.broken_pairs),
)


def families_of(gauges: FleetGauges) -> Iterable[Metric]:
    """All of it as Prometheus metrics."""
    for name, text, value_of in PER_INSTANCE:
        family = GaugeMetricFamily(f"cascadeinfer_instance_{name}", text, labels=["instance", "stage"])
        for gauge in gauges.instances:
            family.add_metric([gauge.instance_id, gauge.stage], value_of(gauge))
        yield family
    yield _held_blocks(gauges.instances)
    yield _kinds(gauges.instances)
    yield from _counted(gauges.instances)
    yield from _by_stage(gauges.instances)
    yield from _layout(gauges)
    yield _links(gauges.links)


def _held_blocks(instances: Sequence[InstanceGauges]) -> Metric:
    family = GaugeMetricFamily(
        "cascadeinfer_instance_held_blocks",
        "KV blocks that no request runs or waits with, by what holds them.",
        labels=["instance", "stage", "reason"],
    )
    for gauge in instances:
        for reason, n_blocks in gauge.held_blocks.items():
            family.add_metric([gauge.instance_id, gauge.stage, reason], n_blocks)
    return family


def _kinds(instances: Sequence[InstanceGauges]) -> Metric:
    family = GaugeMetricFamily(
        "cascadeinfer_instance_kind",
        "What the instance is, in its labels; always 1.",
        labels=["instance", "stage", "role", "step_model", "kv_tokens", "max_num_seqs"],
    )
    for gauge in instances:
        if (kind := gauge.kind) is not None:
            labels = [kind.role.value, kind.step_model_key, str(kind.capacity.kv_tokens)]
            family.add_metric([gauge.instance_id, gauge.stage, *labels, str(kind.capacity.max_num_seqs)], 1.0)
    return family


def _counted(instances: Sequence[InstanceGauges]) -> Iterable[Metric]:
    phases = Counter(gauge.phase for gauge in instances)
    by_phase = GaugeMetricFamily("cascadeinfer_instances", "Instances by phase.", labels=["phase"])
    for phase in sorted({*PHASES.values()} - {PHASES[State.GONE]}):
        by_phase.add_metric([phase], phases[phase])
    yield by_phase
    yield GaugeMetricFamily(
        "cascadeinfer_suspect_instances",
        "Instances whose report is overdue.",
        value=float(sum(gauge.suspect for gauge in instances)),
    )


def _by_stage(instances: Sequence[InstanceGauges]) -> Iterable[Metric]:
    running = GaugeMetricFamily("cascadeinfer_stage_running", "Requests running in a stage.", labels=["stage"])
    waiting = GaugeMetricFamily("cascadeinfer_stage_waiting", "Requests waiting in a stage.", labels=["stage"])
    usage = GaugeMetricFamily("cascadeinfer_stage_kv_usage", "Mean share of KV blocks in use.", labels=["stage"])
    size = GaugeMetricFamily("cascadeinfer_stage_instances", "Instances of a stage.", labels=["stage"])
    for stage in sorted({gauge.stage for gauge in instances}):
        members = [gauge for gauge in instances if gauge.stage == stage]
        running.add_metric([stage], sum(gauge.running for gauge in members))
        waiting.add_metric([stage], sum(gauge.waiting for gauge in members))
        usage.add_metric([stage], sum(gauge.kv_usage for gauge in members) / len(members))
        size.add_metric([stage], len(members))
    yield from (running, waiting, usage, size)


def _links(links: Sequence[Link]) -> Metric:
    family = GaugeMetricFamily(
        "cascadeinfer_link_tokens_per_second",
        "Tokens of KV cache per second that moves get over a link, the median of the links of this kind.",
        labels=["relation"],
    )
    for relation, is_within in (("within_node", True), ("between_nodes", False)):
        if rates := [link.tokens_per_s for link in links if (link.source == link.target) is is_within]:
            family.add_metric([relation], median(rates))
    return family


def _layout(gauges: FleetGauges) -> Iterable[Metric]:
    lower = GaugeMetricFamily(
        "cascadeinfer_stage_lower_bound_tokens", "Shortest sequence of a stage, in tokens.", labels=["stage"]
    )
    upper = GaugeMetricFamily(
        "cascadeinfer_stage_upper_bound_tokens",
        "Length in tokens from which on a sequence belongs to the next stage.",
        labels=["stage"],
    )
    for number, stage in enumerate(() if gauges.layout is None else gauges.layout.stages):
        lower.add_metric([str(number)], stage.range.lo_tokens)
        is_last = stage.range.hi_tokens >= UNBOUNDED_TOKENS
        upper.add_metric([str(number)], float("inf") if is_last else stage.range.hi_tokens)
    yield from (lower, upper)
    age = GaugeMetricFamily("cascadeinfer_plan_age_seconds", "Time since the stages in force were put in force.")
    if gauges.plan_age_s is not None:
        age.add_metric([], gauges.plan_age_s)
    yield age
