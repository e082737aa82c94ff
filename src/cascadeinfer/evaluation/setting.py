"""
A setting: one model on one device, the lengths of a workload, a number of instances, and the planning objective.

The trace provides the lengths; each run draws arrivals at its own rate. Requests longer than the context, or than an
instance's KV cache, are cut and counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from cascadeinfer.config.profiles import load_fit_profile
from cascadeinfer.config.traces import load_trace
from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.errors import ConfigError, PlanError
from cascadeinfer.core.plan.objective import BalancedLatency, MeanNormalizedLatency, Objective
from cascadeinfer.core.plan.planner import Plan, capacity_rate, solve
from cascadeinfer.core.plan.problem import DEFAULT_MARGIN, HandOverCost, PlanProblem
from cascadeinfer.core.plan.role_plan import RolePlan
from cascadeinfer.core.plan.roles import DEFAULT_BUDGETS, solve_roles
from cascadeinfer.workload.trace import CappedTrace, Trace

DEFAULT_CONTEXT_TOKENS: Final = 131_072
OVERLOAD_SHARE: Final = 0.9
"""Share of the capacity to plan for when the demand exceeds it, as at run time (`replanning.py`)."""


@dataclass(frozen=True)
class Setting:
    """
    A model on a device, a workload and a number of instances.

    Attributes:
        profile: Cost profile of the model on the device.
        capped: The trace, cut to `context_tokens`, with counts of what was cut.
        context_tokens: Longest sequence.
        n_instances: Number of instances that share the work.
        objective: What plans minimise; None: mean normalised latency, and `BalancedLatency` for plans with roles.
        margin: Minimum gain of several stages over one.
    """

    profile: CostProfile
    capped: CappedTrace
    context_tokens: int
    n_instances: int
    objective: Objective | None = None
    margin: float = DEFAULT_MARGIN

    @property
    def trace(self) -> Trace:
        """The trace after cutting."""
        return self.capped.trace

    @cached_property
    def histogram(self) -> LengthHistogram:
        """Lengths of the whole trace."""
        return LengthHistogram.from_requests(self.trace.prompt_tokens, self.trace.output_tokens)

    @property
    def stage_objective(self) -> Objective:
        """What plans without roles minimise."""
        return self.objective or MeanNormalizedLatency()

    @property
    def hand_over(self) -> HandOverCost:
        """Cost of a hand-over over this profile's links."""
        return HandOverCost(pause_per_token_s=self.profile.transfer_s(1))

    @cached_property
    def one_stage_capacity_rps(self) -> float:
        """Requests per second that plain load balancing carries in steady state; loads are given as fractions of it."""
        return capacity_rate(self.histogram, self.profile.step_model, self.profile.capacity, self.n_instances)

    def with_token_budget(self, max_batched_tokens: int | None) -> "Setting":
        """The same with another token budget of a step (vLLM's `max_num_batched_tokens`); None: the profile's."""
        if max_batched_tokens is None:
            return self
        capacity = self.profile.capacity.with_token_budget(max_batched_tokens)
        return replace(self, profile=replace(self.profile, capacity=capacity))

    def problem(self, rate_rps: float) -> PlanProblem:
        """The planning problem at this rate."""
        return PlanProblem(
            self.histogram,
            self.profile.step_model,
            self.profile.capacity,
            rate_rps,
            self.n_instances,
            objective=self.stage_objective,
            margin=self.margin,
            hand_over=self.hand_over,
        )

    def plan(self, rate_rps: float) -> Plan:
        """
        The best layout at this rate.

        Raises:
            PlanError: The rate is above the capacity of every layout; the message says what could be served.
        """
        return solve(self.problem(rate_rps))

    def plan_within_capacity(self, rate_rps: float) -> Plan:
        """
        The best layout at this rate, or at `OVERLOAD_SHARE` of the capacity if the rate is above it.

        Raises:
            PlanError: Not even that can be planned.
        """
        try:
            return self.plan(rate_rps)
        except PlanError as error:
            if not error.capacity_per_s:
                raise
            return self.plan(OVERLOAD_SHARE * error.capacity_per_s)

    def role_budgets(self) -> tuple[int, ...]:
        """The chunk budgets that a plan with roles chooses from: the usual ones and the profile's."""
        return tuple(sorted({*DEFAULT_BUDGETS, self.profile.capacity.max_batched_tokens}))

    def plan_roles(
        self, rate_rps: float, budgets: Sequence[int], *, split: bool = False, n_prefill: int | None = None
    ) -> RolePlan:
        """
        The best plan with roles at this rate.

        Args:
            rate_rps: Requests per second.
            budgets: Chunk budgets to choose from.
            split: Only plain prefill/decode splitting.
            n_prefill: With `split`: the instances for prompts; None: the best number.

        Raises:
            PlanError: The rate is above the capacity of every such plan.
        """
        problem = self.problem(rate_rps)
        if self.objective is None and not split:
            problem = replace(problem, objective=BalancedLatency())
        return solve_roles(problem, tuple(budgets), split=split, n_prefill=n_prefill)

    def notes(self) -> list[str]:
        """Notes on what was left out and cut; empty if nothing was."""
        cut = (("prompts", self.capped.prompts_cut), ("outputs", self.capped.outputs_cut))
        failed = self.trace.dropped_rows
        left_out = [f"{failed} requests of the trace that had no answer are left out"] if failed else []
        return left_out + [
            f"{n} of {len(self.trace)} {what} were cut to a context of {self.context_tokens} tokens"
            for what, n in cut
            if n
        ]


def load_setting(
    profile: str,
    trace: Path,
    instances: int,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    objective: Objective | None = None,
    margin: float = DEFAULT_MARGIN,
    hashes: Path | None = None,
    *,
    accept_poor_profile: bool = False,
) -> Setting:
    """
    Load and validate a setting.

    Raises:
        ConfigError: A number is out of bounds, or the trace file cannot be read.
        ProfileError: There is no such profile (the message lists those that exist), or it is poor.
        TraceError: The trace is malformed; the message gives the line.
    """
    if instances < 1:
        raise ConfigError(f"{instances} is not at least 1", option="--instances")
    if context_tokens < 2:
        raise ConfigError(f"{context_tokens} is not at least 2", option="--context")
    if not (math.isfinite(margin) and 0.0 <= margin < 1.0):
        raise ConfigError(f"{margin} is not in [0, 1)", option="--margin", fix="0.03 is 3 %")
    loaded = load_fit_profile(profile, accept_poor=accept_poor_profile)
    fitting = min(context_tokens, loaded.capacity.kv_tokens)
    whole = load_trace(trace, hashes_path=hashes)
    if not len(whole):
        raise ConfigError(f"{trace} has no requests", option="--trace")
    return Setting(loaded, whole.capped(fitting), fitting, instances, objective, margin)


def check_rate(rate_rps: float, option: str = "--rate") -> None:
    """
    Validate a rate.

    Raises:
        ConfigError: It is not positive and finite.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0.0):
        raise ConfigError(f"{rate_rps} is not a positive number", option=option, fix="requests per second")


def check_served(setting: Setting, rates_rps: Sequence[float], token_budgets: Sequence[int | None] = (None,)) -> None:
    """
    Check that some layout can carry each rate at each token budget of a step (None: the profile's).

    Raises:
        PlanError: A rate is above capacity; the message says what could be served.
    """
    for budget in token_budgets:
        for rate_rps in rates_rps:
            setting.with_token_budget(budget).plan(rate_rps)
