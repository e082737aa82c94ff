"""Load, or compile, what planning and learning need: seconds that must not come upon a server that serves."""

from typing import Final

from cascadeinfer.core.adapt.replanning import ModelPlanner, PlanSettings
from cascadeinfer.core.cost.histogram import DEFAULT_MAX_TOKENS, LengthHistogram
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import StepLearner
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.plan.role_plan import PushCost
from cascadeinfer.core.plan.role_prediction import StageInForce, predict_roles
from cascadeinfer.core.plan.roles import solve_roles
from cascadeinfer.core.types import InstanceCapacity, LengthRange

_CAPACITY: Final = InstanceCapacity(kv_blocks=10_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=2048)
_MODEL: Final = StepModel(
    base_s=0.01,
    per_decode_s=1e-5,
    per_kv_token_s=1e-7,
    per_prefill_token_s=1e-5,
    per_prefill_attention_s=1e-10,
)


def warm_up() -> None:
    """Plan and learn once, from made-up requests and steps."""
    planner = ModelPlanner(_MODEL, PlanSettings(max_tokens=DEFAULT_MAX_TOKENS))
    planner(_workload(), 10.0, _CAPACITY, 4, StageLayout.single(("0", "1", "2", "3")))
    learner = StepLearner(_MODEL)
    learner.observe([StepSample(BatchFeatures(1, 10, 10), 0.01)])
    learner.update(1.0)


def warm_up_roles() -> None:
    """The same, and a plan with roles."""
    warm_up()
    problem = PlanSettings(max_tokens=DEFAULT_MAX_TOKENS).problem(_MODEL, _workload(), 10.0, _CAPACITY, 4)
    solve_roles(problem, (512, 2048))
    everything = [StageInForce(LengthRange(0), 3, 512)]
    predict_roles(problem, [StageInForce(LengthRange(256), 1, 2048)], everything, PushCost())


def _workload() -> LengthHistogram:
    return LengthHistogram.from_requests([100, 100, 4000], [50, 500, 300], max_tokens=DEFAULT_MAX_TOKENS)
