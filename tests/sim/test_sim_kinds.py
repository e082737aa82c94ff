"""A cluster of several instance kinds: each instance is run, priced and filled by its own properties."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sim_builders import MODEL, ROUND_MODEL, config, random_trace, tight

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Dispatch, Effect, StartMigration
from cascadeinfer.core.errors import ConfigError, PolicyError
from cascadeinfer.core.events import Event, InstanceJoined
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.policy import Policy
from cascadeinfer.eventlog.reader import open_log
from cascadeinfer.eventlog.replay import replay
from cascadeinfer.eventlog.run_file import write_log_file
from cascadeinfer.eventlog.writer import header_of
from cascadeinfer.sim.faults import Crash, Drain, FaultPlan
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import SimConfig, SimKind
from cascadeinfer.workload.trace import Trace


def slower(model: StepModel, factor: float) -> StepModel:
    """Every part of a step takes this many times as long."""
    return StepModel(*(factor * model.coefficients()).tolist())


SLOW = slower(MODEL, 4.0)
SLOW_KIND = SimKind(InstanceKind(config().capacity, "slow"), SLOW)
WHOLE = replace(config().capacity, kv_blocks=1024, max_num_seqs=256)
HALF = replace(WHOLE, kv_blocks=512)
SMALL = replace(tight().capacity, kv_blocks=25)
"""100 tokens, where the others hold 160."""


def unequal(**changes: object) -> SimConfig:
    """`i0` is fast, `i1` four times as slow."""
    return config(kinds={"i1": SLOW_KIND}, **changes)


def crowded(**changes: object) -> SimConfig:
    """Three instances; `i0` is too small for the longest requests, and slow."""
    kinds = {"i0": SimKind(InstanceKind(SMALL, "slow"), SLOW)}
    return tight(kinds=kinds, max_output_tokens=60, **changes)


def busy_trace(n: int = 300, rate_rps: float = 30.0, seed: int = 3) -> Trace:
    """Poisson arrivals, prompts below 400 and outputs below 200 tokens."""
    return random_trace(np.random.default_rng(seed), n, rate_rps, prompts=400, outputs=200)


def dispatched(policy: Policy, trace: Trace, settings: SimConfig) -> tuple[SimResult, Counter[str]]:
    """Run it with every invariant checked; returns the result and the number of requests per instance."""
    sent: Counter[str] = Counter()

    def observe(_: float, __: Event, effects: list[Effect]) -> None:
        sent.update(effect.instance_id for effect in effects if isinstance(effect, Dispatch))

    return simulate(trace, policy, settings, check=True, observer=observe), sent


def test_a_step_costs_what_its_instance_takes() -> None:
    """The same request takes exactly twice as long on an instance with twice the step time."""
    kinds = {"i1": SimKind(InstanceKind(config().capacity, "slow"), slower(ROUND_MODEL, 2.0))}
    trace = Trace.from_columns(np.array([100, 100]), np.array([11, 11]), np.array([0.0, 0.0]))
    result = simulate(trace, RoundRobin(), config(step_model=ROUND_MODEL, kinds=kinds), check=True)
    took_s = result.requests.finish_s - result.requests.arrival_s
    assert took_s[0] == pytest.approx(0.010 + 100 * 0.0001 + 10 * (0.010 + 0.001))
    assert took_s[1] == pytest.approx(2.0 * took_s[0])


def test_prices_are_of_the_instance_that_runs_the_batch() -> None:
    """Each instance is priced by its own kind's model: the empty slow one costs four times the fast one."""
    policy = Cascade(step_model=MODEL, step_models={"slow": SLOW})
    simulate(busy_trace(1), policy, unequal(), check=True)
    fast, slow = (policy.view.instances[instance_id] for instance_id in ("i0", "i1"))
    assert fast.committed_requests == slow.committed_requests == 0
    assert slow.price == pytest.approx(4.0 * fast.price)
    assert slow.marginal_price(100, 0) == pytest.approx(4.0 * fast.marginal_price(100, 0))


def test_work_is_shared_by_speed() -> None:
    """The slow instance gets less work than the fast one, and latency is lower than if they were taken as equal."""
    trace = busy_trace(rate_rps=10.0)
    informed, sent = dispatched(Cascade(step_model=MODEL, step_models={"slow": SLOW}), trace, unequal())
    alike, _ = dispatched(Cascade(step_model=MODEL, step_models={"slow": MODEL}), trace, unequal())
    assert sent["i0"] > 4 * sent["i1"] > 0
    assert informed.requests.normalised_latency_s.mean() < 0.8 * alike.requests.normalised_latency_s.mean()


def test_work_is_shared_by_capacity() -> None:
    """Of two equally fast instances, the one with half the KV cache holds half as many tokens under load."""
    settings = config(capacity=WHOLE, kinds={"i1": SimKind(InstanceKind(HALF), MODEL)})
    result, _ = dispatched(LeastLoaded(), busy_trace(600, 60.0), settings)
    samples = result.samples
    loaded = samples.kv_use > 0.4
    whole, half = (samples.running_tokens[loaded & (samples.instance == number)].mean() for number in (0, 1))
    assert half / whole == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("name", [*sorted(POLICIES), "cascade in stages"])
def test_a_request_goes_only_where_it_fits(name: str) -> None:
    """No policy sends or moves a request to an instance that it may outgrow; the small one serves the rest."""
    layout = StageLayout.from_boundaries((30, 60), (("i1",), ("i0",), ("i2",)))
    policy: Policy = {
        "cascade in stages": lambda: Cascade(layout=layout, step_model=MODEL, step_models={"slow": SLOW}),
        "static_stages": lambda: POLICIES["static_stages"].make(layout=layout),
        "llumnix": lambda: POLICIES["llumnix"].make(migrate_steps=400.0, max_migrations=3, retry_s=0.1),
    }.get(name, POLICIES[name].make if name in POLICIES else Cascade)()
    faults = FaultPlan(crashes=(Crash(1.0, "i2", 0.5),), drains=(Drain(2.5, "i1"),))
    trace = random_trace(np.random.default_rng(1), 150, 40.0, prompts=90)
    where: dict[str, set[str]] = {f"r{row}": set() for row in range(len(trace))}

    def observe(_: float, __: Event, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Dispatch):
                where[effect.request_id].add(effect.instance_id)
            elif isinstance(effect, StartMigration):
                where[effect.request_id].add(effect.target_id)

    result = simulate(trace, policy, crowded(faults=faults), check=True, observer=observe)
    longest = trace.prompt_tokens + 60
    assert all("i0" not in where[f"r{row}"] for row in np.flatnonzero(longest > SMALL.kv_tokens))
    assert any("i0" in where[f"r{row}"] for row in np.flatnonzero(longest <= SMALL.kv_tokens))
    assert not np.isnan(result.requests.finish_s).any()


def test_what_fits_nowhere_now_waits_for_an_instance_that_holds_it() -> None:
    """While only the small instance is up, long requests wait, and short ones that came later do not wait for them."""
    trace = Trace.from_columns(np.array([90, 20]), np.array([5, 5]), np.array([1.0, 1.01]))
    faults = FaultPlan(crashes=tuple(Crash(0.1, i, 4.0) for i in ("i1", "i2")))
    for policy in (Cascade(step_model=MODEL), Cascade(step_model=MODEL, max_queued=8), LeastLoaded()):
        result = simulate(trace, policy, crowded(faults=faults), check=True)
        assert result.requests.dispatched_s == pytest.approx([4.1, 1.01])


def test_requests_move_between_kinds() -> None:
    """Requests that outgrow a stage of small, slow instances move to a larger one, and every token comes once."""
    layout = StageLayout.from_boundaries((40,), (("i0",), ("i1", "i2")))
    policy = Cascade(layout=layout, step_model=MODEL, step_models={"slow": SLOW}, refine=False, replan=False)
    trace = random_trace(np.random.default_rng(2), 200, 8.0, prompts=39)
    result = simulate(trace, policy, crowded(), check=True)
    moved = result.migrations
    outgrew = [
        reason == "outgrew_stage" and outcome == "moved"
        for reason, outcome in zip(moved.reason, moved.outcome, strict=True)
    ]
    assert (moved.source[outgrew] == 0).sum() >= 3
    assert (result.requests.produced_tokens == trace.output_tokens).all()


def test_the_log_carries_kinds_and_replays(tmp_path: Path) -> None:
    """The log header has the models by key, each join has its kind, and a fresh policy decides the same."""
    spec = PolicySpec("cascade", {"step_model": MODEL, "step_models": {"slow": SLOW}})
    path = tmp_path / "run.log"
    header = header_of(spec, source="simulator", instances=("i0", "i1", "i2"), commit=None)
    with write_log_file(path, header) as observer:
        simulate(random_trace(np.random.default_rng(1), 60, 40.0), spec.make(), crowded(), observer=observer)
    log = open_log(path)
    assert log.spec().options == spec.options
    joined = [entry.event for entry in log if isinstance(getattr(entry, "event", None), InstanceJoined)]
    assert {event.instance_id: event.kind for event in joined} == {
        "i0": InstanceKind(SMALL, "slow"),
        "i1": InstanceKind(tight().capacity),
        "i2": InstanceKind(tight().capacity),
    }
    replayed = replay(log)
    assert replayed.difference is None
    assert replayed.effects > 60


class Stubborn(RoundRobin):
    """Sends everything to the small instance."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects = super().handle(event, now_s)
        return [replace(e, instance_id="i0") if isinstance(e, Dispatch) else e for e in effects]


def test_a_policy_that_places_what_does_not_fit_is_told() -> None:
    """The simulator raises, naming the request's need and the instance's capacity, instead of preempting for ever."""
    trace = Trace.from_columns(np.array([90]), np.array([5]), np.array([1.0]))
    with pytest.raises(PolicyError, match="may grow to 150 tokens, the KV cache there holds 100"):
        simulate(trace, Stubborn(), crowded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": {"i7": SLOW_KIND}}, "there is no instance i7"),
        (
            {"kinds": {i: SimKind(InstanceKind(SMALL), MODEL) for i in ("i0", "i1", "i2")}},
            "does not fit the KV cache of 100",
        ),
        (
            {"kinds": {"i0": SimKind(InstanceKind(replace(SMALL, max_batched_tokens=1)), MODEL)}},
            "cannot decode 6 requests",
        ),
    ],
)
def test_kinds_are_checked(changes: dict[str, object], message: str) -> None:
    """Unknown instances, a context that fits no instance and an impossible capacity are refused before the run."""
    with pytest.raises(ConfigError, match=message):
        tight(**changes)


def test_the_same_kind_said_twice_changes_nothing() -> None:
    """Naming an instance with the cluster's own capacity and model is the same as not naming it."""
    plain, _ = dispatched(Cascade(step_model=MODEL), busy_trace(100), config())
    named = {"i1": SimKind(InstanceKind(config().capacity), MODEL)}
    again, _ = dispatched(Cascade(step_model=MODEL), busy_trace(100), config(kinds=named))
    assert plain.requests.finish_s.tolist() == again.requests.finish_s.tolist()
