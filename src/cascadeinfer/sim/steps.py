"""
What a step computes and what it brings about.

These values pass between an instance's scheduler and its clock.
"""

from dataclasses import dataclass, field

from cascadeinfer.sim.requests import SimRequest


@dataclass(slots=True)
class StepPlan:
    """
    What the next step computes beside the decode batch.

    Attributes:
        chunks: Prompts under way with the tokens each computes.
        attention_tokens: Sum over those tokens of the context each attends to.
        preempted: Whether planning it preempted somebody.
        admitted: Whether planning it admitted somebody.
    """

    chunks: list[tuple[SimRequest, int]] = field(default_factory=list)
    prefill_tokens: int = 0
    attention_tokens: float = 0.0
    preempted: bool = False
    admitted: bool = False

    def compute(self, request: SimRequest, chunk_tokens: int) -> None:
        """Add a chunk."""
        self.chunks.append((request, chunk_tokens))
        self.prefill_tokens += chunk_tokens
        self.attention_tokens += chunk_tokens * request.computed + chunk_tokens * (chunk_tokens + 1) / 2


@dataclass(slots=True)
class StepEnd:
    """
    What a finished step brought about.

    Attributes:
        finished: Requests that are complete.
        watched: Requests that a migration watches and that got a token.
        cut: Requests that left the batch with their KV cache pinned.
        parked: Requests that did so with their first token.
    """

    finished: list[SimRequest] = field(default_factory=list)
    watched: list[SimRequest] = field(default_factory=list)
    cut: list[SimRequest] = field(default_factory=list)
    parked: list[SimRequest] = field(default_factory=list)
