"""For any trace, policy and faults, the invariants hold after every event, and the fast path equals the slow path."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_builders import POLICY_NAMES, faulty, policy_named, random_trace, same, tight

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import SimConfig
from cascadeinfer.workload.trace import Trace

seeds = st.integers(0, 2**32 - 1)


def copying_ahead(config: SimConfig, precopy: bool) -> SimConfig:
    """Full blocks are copied before the cut, or not; a link so slow that it pays."""
    network = replace(config.network, link_bytes_per_s=config.kv_bytes_per_token * 500.0)
    return replace(config, migration=replace(config.migration, precopy=precopy), network=network) if precopy else config


@settings(max_examples=60)
@given(
    seed=seeds,
    name=st.sampled_from(POLICY_NAMES),
    caching=st.booleans(),
    precopy=st.booleans(),
    rate_rps=st.sampled_from([5.0, 40.0, 400.0]),
)
def test_invariants_hold_under_faults(seed: int, name: str, caching: bool, precopy: bool, rate_rps: float) -> None:
    """One place per request, tokens once and in order, and blocks conserved, after every event of a faulty run."""
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, 40, rate_rps)
    config = copying_ahead(tight(prefix_caching=caching, faults=faulty(seed, trace, 3), seed=seed), precopy)
    result = simulate(trace, policy_named(name, 3, seed), config, check=True)
    requests = result.requests
    assert (requests.finished | requests.aborted).all()
    assert (requests.produced_tokens[requests.finished] == requests.output_tokens[requests.finished]).all()


@settings(max_examples=60)
@given(
    seed=seeds,
    name=st.sampled_from(POLICY_NAMES),
    caching=st.booleans(),
    faults=st.booleans(),
    precopy=st.booleans(),
    rate_rps=st.sampled_from([5.0, 40.0, 400.0]),
)
def test_fast_path_equals_step_by_step(
    seed: int, name: str, caching: bool, faults: bool, precopy: bool, rate_rps: float
) -> None:
    """With and without fast-forward, every recorded time and count is the same to the last bit."""
    trace = random_trace(np.random.default_rng(seed), 40, rate_rps)
    config = copying_ahead(tight(prefix_caching=caching, seed=seed), precopy)
    if faults:
        config = replace(config, faults=faulty(seed, trace, 3))
    fast = simulate(trace, policy_named(name, 3, seed), config)
    slow = simulate(trace, policy_named(name, 3, seed), replace(config, fast_forward=False))
    same(fast, slow)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_seed_is_a_run(name: str) -> None:
    """The same trace, policy, configuration and seed give the same records."""
    trace = random_trace(np.random.default_rng(7), 200, 60.0)
    config = tight(faults=faulty(3, trace, 3), seed=11)
    same(simulate(trace, policy_named(name, 3, 5), config), simulate(trace, policy_named(name, 3, 5), config))


@pytest.mark.parametrize("profile_name", ["a100-llama-3.1-8b", "h100-qwen3-30b-a3b", "l40s-llama-3.1-8b"])
def test_fast_path_equals_step_by_step_on_shipped_profiles(profile_name: str) -> None:
    """With split rules, waves, experts and capacities of real devices, the two paths still agree to the last bit."""
    profile = load_profile(profile_name)
    rng = np.random.default_rng(1)
    n = 150
    trace = Trace.from_columns(
        np.ceil(rng.lognormal(6.0, 1.5, n)).clip(1, 30_000),
        np.ceil(rng.lognormal(5.0, 1.0, n)).clip(1, 2000),
        np.cumsum(rng.exponential(0.05, n)),
    )
    config = SimConfig(
        instances=3,
        capacity=profile.capacity,
        step_model=profile.step_model,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        context_tokens=32_768,
    )
    fast = simulate(trace, policy_named("restless", 3, 2), config)
    slow = simulate(trace, policy_named("restless", 3, 2), replace(config, fast_forward=False))
    same(fast, slow)
    assert "moved" in fast.migrations.outcome
    assert fast.events < slow.events
