"""
Which step model prices which instances: the given ones, corrected by the instances' reports, or learned from them.

Each key (`InstanceKind.step_model_key`) has its own model, which learns only from the steps of its own instances.

Prices are compared between instances, so all share one unit. As long as any instance present has no model, every
instance is priced by nominal proportions, in which kinds differ only by capacity; `core/pace.py` then identifies the
slow ones. No instance is priced by another's model.
"""

from collections.abc import Iterable, Mapping, Sequence

from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.learning import LearningSettings, StepLearner
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.kind import DEFAULT_STEP_MODEL, InstanceKind, StepModelKey
from cascadeinfer.core.types import InstanceCapacity

USUAL_BATCH = BatchFeatures(
    n_decode=32,
    decode_kv_tokens=32 * 2048,
    decode_kv_tokens_max=4096,
    prefill_tokens=512,
    prefill_attention_tokens=512 * 513 / 2,
)
"""Says which of several models is the slowest: a chunk of a prompt beside decodes that fill none of today's devices."""


class StepModels:
    """See the module header."""

    def __init__(
        self,
        default: StepModel | None = None,
        named: Mapping[StepModelKey, StepModel] | None = None,
        learning: LearningSettings | None = None,
    ) -> None:
        """
        Args:
            default: Initial model of the instances with the default key; None if unknown.
            named: Initial models of the other keys.
            learning: How models follow what instances report; None keeps them as they are.
        """
        self._models = dict(named or {})
        if default is not None:
            self._models[DEFAULT_STEP_MODEL] = default
        self._learning = learning
        self._learners: dict[StepModelKey, StepLearner] = {}
        self._there: tuple[StepModelKey, ...] = ()

    @property
    def expected(self) -> bool:
        """Whether there is a model, or may be one later."""
        return bool(self._models) or self._learning is not None

    def of(self, key: StepModelKey) -> StepModel | None:
        """The model of this key; None while it is unknown."""
        return self._models.get(key)

    def pricing(self, key: StepModelKey) -> StepModel | None:
        """The model that prices instances of this key; None for nominal proportions. See the module header."""
        return self._models.get(key) if self._complete else None

    def follow(self, kinds: Iterable[InstanceKind]) -> bool:
        """
        Instances have come or gone.

        Args:
            kinds: Kinds of all instances present.

        Returns:
            Whether the unit of prices has changed.
        """
        before = self._complete
        self._there = tuple(sorted({kind.step_model_key for kind in kinds}))
        if self._learning is not None:
            for key in self._there:
                if key not in self._learners:
                    self._learners[key] = StepLearner(self._models.get(key), self._learning)
        return self._complete != before

    def observe(self, key: StepModelKey, steps: Sequence[StepSample]) -> None:
        """Steps that an instance of this key has reported."""
        if steps and (learner := self._learners.get(key)) is not None:
            learner.observe(steps)

    def is_due(self, now_s: float) -> bool:
        """Whether `update` should be called."""
        due = [
            learner for learner in self._learners.values() if learner.is_due(now_s)
        ]  # a first question starts a clock
        return bool(due)

    def update(self, now_s: float) -> bool:
        """Learn from the observed steps where it is due. Returns whether a model has changed."""
        changed = False
        for key, learner in self._learners.items():
            if learner.is_due(now_s) and learner.update(now_s):
                assert learner.model is not None  # it has changed
                self._models[key] = learner.model
                changed = True
        return changed

    def weakest(self, kinds: Iterable[InstanceKind]) -> tuple[StepModel | None, InstanceCapacity]:
        """
        The basis of a plan for these instances, since a plan assumes one kind: the slowest model and the smallest of
        each capacity.

        Whichever instance a stage is then given, it performs at least as planned. The plan does not exploit a faster or
        larger one, but prices do.

        Args:
            kinds: Of the instances; at least one.

        Returns:
            Model and capacity; no model while nothing is known of any of these instances, or what is missing is still
            being learned.

        Raises:
            PlanError: Some have a model and others will never have one.
        """
        kinds = tuple(kinds)
        smallest = min((kind.capacity for kind in kinds), key=lambda capacity: capacity.kv_tokens)
        capacity = InstanceCapacity(
            smallest.kv_blocks,
            smallest.block_size_tokens,
            min(kind.capacity.max_num_seqs for kind in kinds),
            min(kind.capacity.max_batched_tokens for kind in kinds),
        )
        models = {kind.step_model_key: self._models.get(kind.step_model_key) for kind in kinds}
        known = [model for model in models.values() if model is not None]
        if len(known) == len(models):
            return max(known, key=lambda model: model.step_s(USUAL_BATCH)) if len(known) > 1 else known[0], capacity
        if known and self._learning is None:
            missing = sorted(key for key, model in models.items() if model is None)
            raise PlanError(f"no step model for the instances of {', '.join(map(repr, missing))}")
        return None, capacity

    @property
    def _complete(self) -> bool:
        """Whether every instance present has a model."""
        return all(key in self._models for key in self._there)
