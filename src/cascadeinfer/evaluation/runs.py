"""
One run: a policy, a rate and a seed in a setting.

With the same seed, every policy gets the same requests at the same times. Lengths are drawn with replacement from the
trace and arrivals from an arrival process; alternatively, a section of the trace is replayed as recorded, scaled to the
run's rate. Figures can exclude the first part of the run, in which the cluster fills (`warm_up`), and the last, in
which it empties (`cool_down`).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.kind import InstanceKind, InstanceTerms, Role
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.plan.planner import Plan
from cascadeinfer.core.plan.role_plan import RolePlan
from cascadeinfer.core.policies.info import RoleSearch
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.types import InstanceId
from cascadeinfer.evaluation.front_ends import SeveralFrontEnds
from cascadeinfer.evaluation.setting import OVERLOAD_SHARE, Setting
from cascadeinfer.evaluation.variants import policy_spec, role_search, starts_with_plan
from cascadeinfer.eventlog.run_file import write_log_file
from cascadeinfer.eventlog.writer import header_of
from cascadeinfer.results.provenance import own_commit
from cascadeinfer.results.records import InstanceSamples, MigrationRecords, RequestRecords
from cascadeinfer.results.summary import RunSummary, Slo, summarise, summarise_between
from cascadeinfer.sim.policy_loop import Observer
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, SimKind, instance_ids
from cascadeinfer.workload.drawing import ArrivalLaw, draw_requests
from cascadeinfer.workload.trace import Trace


@dataclass(frozen=True, slots=True)
class RunSpec:
    """
    The parameters of a run.

    Attributes:
        policy: Name of the policy (`evaluation/variants.py`).
        rate_rps: Requests per second.
        seed: Seed of lengths, arrivals and the network.
        requests: Number of requests.
        slo: What counts as good.
        warm_up: Share of the requests, from the first on, that figures exclude.
        cool_down: Share of the requests, up to the last, that figures exclude.
        allow_overload: If the rate is above capacity, plan for what could be served instead of raising.
        arrivals: The arrival process.
        prefix_caching: Whether prompts share blocks according to the trace's prefix hashes.
        precopy: Whether full blocks of requests that move are copied before the cut. The plan counts whole pulls.
        max_batched_tokens: Token budget of a step, which bounds the chunks of prompts; None: the profile's, or for a
            policy with roles whatever its plan gives each stage.
        n_prefill: Instances for prompts of a policy that splits; None: as many as are predicted to be best.
        front_ends: Processes that share the requests, each with a policy of its own (`evaluation/front_ends.py`).
    """

    policy: str
    rate_rps: float
    seed: int
    requests: int
    slo: Slo
    warm_up: float = 0.0
    cool_down: float = 0.0
    allow_overload: bool = False
    arrivals: ArrivalLaw = field(default_factory=ArrivalLaw)
    prefix_caching: bool = False
    max_batched_tokens: int | None = None
    front_ends: int = 1
    n_prefill: int | None = None
    precopy: bool = False

    @property
    def label(self) -> str:
        """The policy, and the token budget if it is not the profile's."""
        return label_of(self.policy, self.max_batched_tokens)


def label_of(policy: str, max_batched_tokens: int | None) -> str:
    """Name of a policy at a token budget; None: the profile's."""
    return policy if max_batched_tokens is None else f"{policy} @{max_batched_tokens}"


@dataclass(frozen=True, slots=True, eq=False)
class RunOutcome:
    """
    The results of a run.

    Attributes:
        summary: Metrics of the counted part.
        requests: All requests.
        migrations: The migrations that have ended.
        samples: The instances' reports; None if they were not kept.
        layouts: Stage layouts, each with the time from which it was in force.
        end_s: Virtual time at the end.
    """

    spec: RunSpec
    summary: RunSummary
    requests: RequestRecords
    migrations: MigrationRecords
    samples: InstanceSamples | None
    layouts: tuple[tuple[float, StageLayout], ...]
    end_s: float

    @property
    def counted(self) -> RequestRecords:
        """The requests that the figures count."""
        return self.requests.arrived_in(*counted_span_s(self.spec, self.requests))


def workload_of(setting: Setting, spec: RunSpec) -> Trace:
    """
    The requests of a run: a function of trace, seed, number, rate and arrival process, not of the policy.

    Raises:
        ConfigError: Recorded arrivals are requested, but the trace has none, or too few.
    """
    return draw_requests(setting.trace, spec.arrivals, spec.requests, spec.rate_rps, np.random.default_rng(spec.seed))


def plan_for(setting: Setting, spec: RunSpec) -> Plan | None:
    """
    The layout that the run starts with; None for a policy that starts without a plan.

    Args:
        setting: Where to run, with the run's token budget.
        spec: What to run.

    Raises:
        PlanError: The rate is above capacity and `allow_overload` is off.
    """
    if not starts_with_plan(spec.policy):
        return None
    return setting.plan_within_capacity(spec.rate_rps) if spec.allow_overload else setting.plan(spec.rate_rps)


def roles_for(setting: Setting, spec: RunSpec) -> RolePlan | None:
    """
    The plan with roles that the run starts with; None for a policy without roles.

    Args:
        setting: Where to run, with the run's token budget.
        spec: What to run.

    Raises:
        PlanError: The rate is above the capacity of every such plan and `allow_overload` is off.
    """
    search = role_search(spec.policy)
    if search is None:
        return None
    chooses = search is RoleSearch.FULL and spec.max_batched_tokens is None
    budgets = setting.role_budgets() if chooses else (setting.profile.capacity.max_batched_tokens,)
    rate_rps = spec.rate_rps
    while True:
        try:
            return setting.plan_roles(rate_rps, budgets, split=search is RoleSearch.SPLIT, n_prefill=spec.n_prefill)
        except PlanError:
            if not spec.allow_overload or rate_rps < 0.01 * spec.rate_rps:
                raise
            rate_rps *= OVERLOAD_SHARE


def kinds_for(setting: Setting, roles: RolePlan | None) -> dict[InstanceId, SimKind]:
    """
    The instances of each stage with the role and the chunk budget of its plan.

    All are started alike: with as many slots as the smallest budget of the plan allows, and with the largest budget.
    """
    if roles is None:
        return {}
    profile, most = setting.profile, max(setting.role_budgets())
    started = InstanceKind(
        replace(
            profile.capacity.with_token_budget(min(stage.budget_tokens for stage in roles.every)),
            max_batched_tokens=most,
        )
    )
    return {
        instance_id: SimKind(
            started.with_terms(InstanceTerms(Role(stage.kind.value), stage.budget_tokens)), profile.step_model
        )
        for stage, ids in roles.dealt(instance_ids(setting.n_instances))
        for instance_id in ids
    }


def run_once(
    setting: Setting,
    spec: RunSpec,
    *,
    keep_samples: bool = False,
    progress: Callable[[float, int], None] | None = None,
    event_log: Path | None = None,
) -> RunOutcome:
    """
    Execute a run.

    Args:
        setting: Where to run.
        spec: What to run.
        keep_samples: Keep the instances' reports, for timelines.
        progress: Called from time to time with the virtual time and the number of ended requests.
        event_log: File for each event with its effects, for `cascadeinfer replay`; a name ending in `.gz` is
            compressed.

    Raises:
        ConfigError: The event log cannot be written.
        PlanError: The rate is above capacity, the policy needs a plan, and `allow_overload` is off.
    """
    setting = setting.with_token_budget(spec.max_batched_tokens)
    profile = setting.profile
    roles = roles_for(setting, spec)
    config = SimConfig(
        instances=setting.n_instances,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=setting.context_tokens,
        network=NetworkConfig(link_bytes_per_s=profile.transfer_bytes_per_s),
        migration=MigrationLimits(precopy=spec.precopy),
        prefix_caching=spec.prefix_caching,
        seed=spec.seed,
        kinds=kinds_for(setting, roles),
    )
    plan = plan_for(setting, spec)
    chosen = policy_spec(spec.policy, setting, plan, roles)
    policy = chosen.make()
    if spec.front_ends > 1:
        following = policy_spec(spec.policy, setting, plan, roles, follows=True)
        policy = SeveralFrontEnds(policy, [following.make() for _ in range(spec.front_ends - 1)])
    workload = workload_of(setting, spec)
    with _logging(event_log, setting, spec, chosen) as observer:
        result = simulate(workload, policy, config, progress=progress, observer=observer)
    records = result.requests
    shared_s = np.asarray(result.shared_s)
    if spec.warm_up or spec.cool_down:
        start_s, end_s = counted_span_s(spec, records)
        summary = summarise_between(records, start_s, end_s, spec.slo)
        shared_s = shared_s[(shared_s >= start_s) & (shared_s < end_s)]
    else:
        summary = summarise(records, result.end_s, spec.slo)
    summary = replace(summary, shared=len(shared_s))
    return RunOutcome(
        spec,
        summary,
        records,
        result.migrations,
        result.samples if keep_samples else None,
        result.layouts,
        result.end_s,
    )


@contextlib.contextmanager
def _logging(path: Path | None, setting: Setting, spec: RunSpec, policy: PolicySpec) -> Iterator[Observer | None]:
    """Write the run's event log, if one was asked for."""
    if path is None:
        yield None
        return
    header = header_of(
        policy,
        source="simulator",
        instances=instance_ids(setting.n_instances),
        commit=own_commit(),
        profile=setting.profile.name,
        about={
            "variant": spec.label,
            "rate_per_s": spec.rate_rps,
            "seed": spec.seed,
            "requests": spec.requests,
        },
    )
    with write_log_file(path, header) as observer:
        yield observer


def counted_span_s(spec: RunSpec, records: RequestRecords) -> tuple[float, float]:
    """The interval [start, end) of arrival times whose requests count."""
    arrivals = records.arrival_s
    n = len(arrivals)
    first = int(spec.warm_up * n)
    last = n - int(spec.cool_down * n)  # excluded
    return float(arrivals[first]), float(arrivals[last]) if last < n else float(np.nextafter(arrivals[-1], np.inf))
