"""Policies with prefill stages: when a prompt is computed where it decodes, although its prefill stage has room."""

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Dispatch
from cascadeinfer.core.layout import RoleLayout, Stage, StageLayout
from cascadeinfer.core.policies.roles import Roles
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceCapacity, LengthRange
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=4.2e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=512)
IDS = instance_ids(2)
EVERY = LengthRange(0, UNBOUNDED_TOKENS)
LAYOUT = RoleLayout(StageLayout((Stage(EVERY, IDS[1:]),)), (Stage(LengthRange(1000, UNBOUNDED_TOKENS), IDS[:1]),))


def kept_away(trace: Trace) -> int:
    """How many prompts of the prefill stage were computed where they decode."""
    config = SimConfig(
        instances=2, capacity=CAPACITY, step_model=MODEL, kv_bytes_per_token=131_072.0, context_tokens=16_384
    )
    places: list[str] = []

    def note(_now_s: float, _event: object, effects: list[object]) -> None:
        places.extend(e.instance_id for e in effects if isinstance(e, Dispatch) and not e.park)

    simulate(trace, Roles(roles=LAYOUT, step_model=MODEL), config, observer=note)
    return len(places) - int((trace.prompt_tokens < 1000).sum())


def test_a_busy_decode_instance_is_spared() -> None:
    """Eighty requests decode; a prompt that would start there half a second sooner would make all of them wait."""
    short, prompts = 80, 10
    arrivals = [0.01 * n for n in range(short)] + [2.0 + 0.001 * n for n in range(prompts)]
    trace = Trace.from_columns([50] * short + [2000] * prompts, [500] * short + [50] * prompts, arrivals)
    assert kept_away(trace) == 0


def test_an_idle_decode_instance_helps() -> None:
    """Nobody decodes yet, and thirty prompts come at once: the decode instance computes a part of them."""
    trace = Trace.from_columns([2000] * 30, [50] * 30, [0.5 + 0.001 * n for n in range(30)])
    assert 5 < kept_away(trace) < 25
