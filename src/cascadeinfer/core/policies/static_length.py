"""
Fixed buckets by prompt length without migration: what operators build by hand with two pools and a routing rule.

Formula: the bucket of the prompt length; within it, the least loaded instance with room (`core/placing/dispatch.py`),
or else the least loaded one. Requests stay where they were placed, however long they grow.

Inputs read: reports and the buckets. Edge cases: a bucket without instances is served by the nearest bucket that has
some, the shorter one first; without `boundaries_tokens`, instances are spread evenly over the powers of four from 512
up. An instance that joins belongs to the bucket with the fewest instances for its share. Source: e.g. llm-d's
context-length-aware scorer.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.placing.dispatch import Chosen, pick
from cascadeinfer.core.policies.info import PolicyInfo, layout_option
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class StaticLength(PlacingPolicy):
    """One bucket per range of prompt lengths."""

    def __init__(self, *, layout: StageLayout | None = None, boundaries_tokens: Sequence[int] = (512, 2048)) -> None:
        """
        Args:
            layout: Buckets with their instances; None uses `boundaries_tokens` and spreads the instances evenly.
            boundaries_tokens: Upper ends of the buckets, strictly increasing.

        Raises:
            PlanError: The boundaries are not increasing.
        """
        super().__init__()
        self._layout = layout
        self._boundaries = tuple(boundaries_tokens) if layout is None else layout.boundaries_tokens
        if any(low >= high for low, high in zip((0, *self._boundaries), self._boundaries, strict=False)):
            raise PlanError(f"bucket boundaries must be increasing and positive, not {self._boundaries}")

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:  # noqa: ARG002 - buckets are of all
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
