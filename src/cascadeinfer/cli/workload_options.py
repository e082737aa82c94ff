"""What `plan` and `simulate` share: the profile and trace they name, capped and checked, and the planner's problem."""

import math
from dataclasses import dataclass
from pathlib import Path

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.traces import load_trace
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.plan.histogram import LengthHistogram
from cascadeinfer.core.plan.planner import Plan, plan
from cascadeinfer.core.plan.problem import HandOverCost
from cascadeinfer.workload.trace import CappedTrace, Trace

PULL_S = 0.02
"""Pause of a hand-over beside the transfer: commands, set-up of the pull, the steps that end first. Assumed for GPUs; on CPU see
docs/benchmarks.md."""


@dataclass(frozen=True)
class Workload:
    """
    A profile and a trace that fits it.

    Attributes:
        capped: The trace, cut to `context_tokens`, with the counts of what was cut.
    """

    profile: CostProfile
    capped: CappedTrace
    context_tokens: int
    rate_per_s: float
    n_instances: int

    @property
    def trace(self) -> Trace:
        """The trace that is used."""
        return self.capped.trace

    def plan(self, margin: float) -> Plan:
        """The best layout for the trace's lengths at this rate. Raises PlanError above capacity."""
        profile = self.profile
        return plan(
            LengthHistogram.from_requests(self.trace.prompt_tokens, self.trace.output_tokens),
            profile.step_model,
            profile.capacity,
            self.rate_per_s,
            self.n_instances,
            margin=margin,
            hand_over=HandOverCost(PULL_S, profile.kv_bytes_per_token / profile.transfer_bytes_per_s),
        )

    def notes(self) -> list[str]:
        """What was cut, in words; empty when nothing was."""
        cut = (("prompts", self.capped.prompts_cut), ("outputs", self.capped.outputs_cut))
        return [f"{n} {what} were cut to a context of {self.context_tokens} tokens" for what, n in cut if n]


def load_workload(profile: str, trace: Path, rate: float, instances: int, context: int) -> Workload:
    """
    Load and check.

    Raises:
        ConfigError: A number is out of bounds, or the trace file cannot be read.
        ProfileError: There is no such profile; the message lists those that exist.
        TraceError: The trace is malformed; the message has the line.
    """
    if not (math.isfinite(rate) and rate > 0.0):
        raise ConfigError(f"{rate} is not a positive number", option="--rate", fix="requests per second")
    if instances < 1:
        raise ConfigError(f"{instances} is not at least 1", option="--instances")
    if context < 2:
        raise ConfigError(f"{context} is not at least 2", option="--context")
    loaded = load_profile(profile)
    fitting = min(context, loaded.capacity.kv_tokens)
    return Workload(loaded, load_trace(trace).capped(fitting), fitting, rate, instances)
