"""Load, or compile, what planning and learning need: seconds that must not come upon a server that serves."""

from cascadeinfer.core.adapt.replanning import ModelPlanner, PlanSettings
from cascadeinfer.core.cost.histogram import DEFAULT_MAX_TOKENS, LengthHistogram
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import StepLearner
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import InstanceCapacity


def warm_up() -> None:
    """Plan and learn once, from made-up requests and steps."""
    capacity = InstanceCapacity(kv_blocks=10_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=2048)
    model = StepModel(
        base_s=0.01,
        per_decode_s=1e-5,
        per_kv_token_s=1e-7,
        per_prefill_token_s=1e-5,
        per_prefill_attention_s=1e-10,
    )
    planner = ModelPlanner(model, PlanSettings(max_tokens=DEFAULT_MAX_TOKENS))
    workload = LengthHistogram.from_requests([100, 100, 4000], [50, 500, 300], max_tokens=DEFAULT_MAX_TOKENS)
    planner(workload, 10.0, capacity, 4, StageLayout.single(("0", "1", "2", "3")))
    learner = StepLearner(model)
    learner.observe([StepSample(BatchFeatures(1, 10, 10), 0.01)])
    learner.update(1.0)
