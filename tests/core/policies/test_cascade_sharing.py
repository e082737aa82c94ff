"""The cascade with and without sharing: the same decisions, one by one, until a backlog sends a request elsewhere."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Dispatch, Effect
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace
from support.policy_world import LARGE, World

LAYOUT = StageLayout.from_boundaries((60, 200), (("i0", "i1"), ("i2", "i3"), ("i4",)))
MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=4.2e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)


def act(world: World, kind: int, a: int, b: int) -> None:
    """One random command: a request arrives, an instance reports, a request ends, messages arrive, a move ends."""
    there = sorted(world.draining)
    if kind < 4:
        hashes = tuple(range(b % 3 * 100, b % 3 * 100 + a % 10))
        world.arrive(f"r{len(world.log)}.{a}", 1 + a % 260, 1 + b % 1200, prefix_hashes=hashes)
    elif kind < 7:
        world.grow(there[a % len(there)], b % 60)
        world.report(there[a % len(there)])
    elif kind < 8 and world.requests:
        world.finish(list(world.requests)[a % len(world.requests)])
    elif kind < 9:
        world.deliver_all()
    else:
        world.advance(a % 1000 / 5000.0)


def driven(steps: list[tuple[int, int, int]], **options: bool) -> list[Effect]:
    """The effects of a cascade with three stages under these commands."""
    world = World(Cascade(layout=LAYOUT, **options))  # type: ignore[arg-type]
    world.join("i0", "i1", "i2", "i3", "i4")
    for kind, a, b in steps:
        act(world, kind, a, b)
    return world.log


def is_shared(effect: Effect) -> bool:
    """Whether a backlog decided."""
    return isinstance(effect, Dispatch) and effect.shared


numbers = st.integers(0, 1_000_000)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), numbers, numbers), min_size=20, max_size=150))
def test_decisions_are_the_same_until_the_first_that_is_shared(steps: list[tuple[int, int, int]]) -> None:
    """Under random events, effect by effect: all up to the first shared dispatch, and all of them if there is none."""
    with_it, without = driven(steps, share=True), driven(steps, share=False)
    assert not any(map(is_shared, without))
    first = next((n for n, effect in enumerate(with_it) if is_shared(effect)), None)
    if first is None:
        assert with_it == without
    else:
        assert with_it[:first] == without[:first]
        mine, theirs = with_it[first], without[first]
        assert isinstance(mine, Dispatch)
        assert isinstance(theirs, Dispatch)
        assert mine.request_id == theirs.request_id
        assert mine.instance_id != theirs.instance_id


CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=2048)
IDS = instance_ids(4)
STAGES = StageLayout.from_boundaries((3000,), (IDS[:2], IDS[2:]))


def simulated(trace: Trace, *, share: bool) -> tuple[SimResult, list[tuple[float, Event, list[Effect]]]]:
    """A run of four instances in two stages, with everything that the policy saw and did."""
    policy = Cascade(layout=STAGES, step_model=MODEL, replan=False, refine=False, share=share)
    config = SimConfig(
        instances=4, capacity=CAPACITY, step_model=MODEL, kv_bytes_per_token=131_072.0, context_tokens=16_384
    )
    seen: list[tuple[float, Event, list[Effect]]] = []
    return simulate(trace, policy, config, observer=lambda *what: seen.append(what)), seen


def test_without_a_backlog_every_event_is_answered_alike() -> None:
    """At a rate at which prompts hardly meet, both policies see the same events and do the same, to the last float."""
    trace = Trace.from_columns([200, 4000, 900, 50] * 60, [80, 30, 200, 300] * 60, [0.12 * n for n in range(240)])
    (with_it, seen), (without, also) = simulated(trace, share=True), simulated(trace, share=False)
    assert with_it.shared_s == without.shared_s == ()
    assert seen == also


def test_a_backlog_of_prompts_is_shared() -> None:
    """
    Forty prompts of one stage at once: those beyond what its instances can start soon go to the other stage, are
    counted, and the last first token comes in much less time.
    """
    arrivals = [0.5 + 0.001 * n for n in range(40)]
    trace = Trace.from_columns([2000] * 40, [50] * 40, arrivals)
    (with_it, seen), (without, _) = simulated(trace, share=True), simulated(trace, share=False)
    shared = [effect for _, _, effects in seen for effect in effects if is_shared(effect)]
    assert len(with_it.shared_s) == len(shared) > 5
    assert all(early <= late for early, late in pairwise(with_it.shared_s))
    assert {effect.instance_id for effect in shared if isinstance(effect, Dispatch)} >= set(IDS[2:])
    assert without.shared_s == ()
    assert with_it.requests.ttft_s.max() < 0.7 * without.requests.ttft_s.max()


def test_shared_is_nothing_without_a_model_too() -> None:
    """With nominal prices, a queue of more than a step's tokens is a backlog."""
    world = World(Cascade(layout=StageLayout.from_boundaries((3000,), (("a",), ("b",)))), LARGE)
    world.join("a", "b")
    for number in range(30):
        world.arrive(f"r{number}", 2900)
    assert {request.instance_id for request in world.requests.values()} == {"a", "b"}
