"""
Fixed buckets by prompt length, no migration: what people do by hand with two pools and a router rule.

Formula: the bucket of the prompt length; inside it the least loaded instance with room (`core/placing/dispatch.py`), or the least loaded. Requests stay
where they were placed, however long they grow.

Inputs read: reports, the buckets. Edge cases: a bucket without instances is served by the nearest bucket that has any, the shorter
one first; without `boundaries_tokens` instances are dealt out evenly over the powers of four from 512 up. An instance belongs to the
bucket that has fewest instances for its share when it joins. Source: e.g. llm-d's context-length-aware scorer.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.placing.dispatch import pick
from cascadeinfer.core.policies.info import PolicyInfo, layout_option
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class StaticLength(PlacingPolicy):
    """One bucket per prompt length range."""

    def __init__(self, *, layout: StageLayout | None = None, boundaries_tokens: Sequence[int] = (512, 2048)) -> None:
        """
        Args:
            layout: Buckets with their instances; None: `boundaries_tokens`, with the instances dealt out evenly.
            boundaries_tokens: Where buckets end, strictly increasing.

        Raises:
            PlanError: The boundaries are not increasing.
        """
        super().__init__()
        self._layout = layout
        self._boundaries = tuple(boundaries_tokens) if layout is None else layout.boundaries_tokens
        if any(low >= high for low, high in zip((0, *self._boundaries), self._boundaries, strict=False)):
            raise PlanError(f"bucket boundaries must be increasing and positive, not {self._boundaries}")

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> InstanceView:  # noqa: ARG002 - buckets are of all
        """The least loaded instance of the prompt's bucket."""
        wanted = sum(boundary <= request.prompt_tokens for boundary in self._boundaries)
        buckets = [list(self.view.able(request, bucket)) for bucket in self._buckets(self.view.available())]
        nearest = min((i for i in range(len(buckets)) if buckets[i]), key=lambda i: (abs(i - wanted), i))
        chosen = pick(buckets[nearest], request.tokens)
        assert chosen is not None  # the bucket is not empty
        return chosen

    def _buckets(self, candidates: Sequence[InstanceView]) -> list[list[InstanceView]]:
        buckets: list[list[InstanceView]] = [[] for _ in range(len(self._boundaries) + 1)]
        for place, candidate in enumerate(candidates):
            named = None if self._layout is None else self._layout.stage_index_of_instance(candidate.instance_id)
            buckets[place * len(buckets) // len(candidates) if named is None else named].append(candidate)
        return buckets


INFO: Final = PolicyInfo(
    make=StaticLength,
    help="the bucket of the prompt length; nothing moves",
    takes_layout=True,
    options_for=layout_option,
)
