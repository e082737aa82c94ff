"""
Your own scheduling policy in a few lines, compared with round robin on the same simulated requests.

    python examples/own_policy.py

The policy draws two instances at random and sends the request to the one with fewer tokens ("power of two choices").
Once its `INFO` is listed in `cascadeinfer.core.policies.POLICIES`, the same class serves on real engines, is simulated
by name, logged and replayed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.traces import load_trace
from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.placing.dispatch import Chosen, first_of, ranked
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.view import InstanceView, RequestView
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import SimConfig
from cascadeinfer.workload.drawing import ArrivalLaw, draw_requests


class TwoChoices(PlacingPolicy):
    """Dispatches each request to the less loaded of two instances drawn at random."""

    def __init__(self, *, seed: int = 0) -> None:
        """Each policy draws from its own generator, so that a run can be repeated."""
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:  # noqa: ARG002
        """The instance whose requests have fewer tokens, with the scores for the request's story."""
        numbers = self._rng.choice(len(candidates), size=min(2, len(candidates)), replace=False)
        drawn = ranked(Measure.TOKENS, tokens_of, [candidates[int(number)] for number in numbers])
        chosen = first_of(drawn, Measure.TOKENS, tokens_of, Rule.DRAWN)
        assert chosen is not None  # at least one was drawn
        return chosen


def tokens_of(instance: InstanceView) -> int:
    """The score: the lower one wins."""
    return instance.kv_tokens


INFO: Final = PolicyInfo(make=TwoChoices, help="the lighter of two instances drawn at random")


def mean_latency_s(policy: Policy, *, rate_per_s: float, requests: int) -> float:
    """Mean time from arrival to the last token, per output token of the request, in seconds. All of it is simulated."""
    profile = load_profile("h200-llama-3.1-8b")
    trace = load_trace(Path("sample"))
    workload = draw_requests(trace, ArrivalLaw(), requests, rate_per_s, np.random.default_rng(1))
    config = SimConfig(
        instances=4,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
    )
    return float(np.nanmean(simulate(workload, policy, config).requests.normalised_latency_s))


def main() -> None:
    """Compare."""
    for policy in (RoundRobin(), TwoChoices()):
        latency_s = mean_latency_s(policy, rate_per_s=12.0, requests=1000)
        print(f"{type(policy).__name__:12} {1e3 * latency_s:6.1f} ms per output token, simulated")


if __name__ == "__main__":
    main()
