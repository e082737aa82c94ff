"""A request as a simulated instance has it, and what it leaves behind when it is cut."""

import math
from dataclasses import dataclass

from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.engines.simulated.model import SimulatedTicket


@dataclass(slots=True)
class Sequence:
    """
    One request of this instance.

    Attributes:
        token_ids: Prompt and output so far.
        computed: Leading tokens with KV cache, whose digest is `digest`.
        last_output_tokens: Output tokens at which it ends; lowered by a cut.
        ticket: Where to pull its KV cache; None when there is nothing (more) to pull.
        pull_ends_s: When the current pull ends.
        pull_before_s: Deadline of the pull; its blocks are used only if it ends before.
        copied_tokens: Leading tokens whose KV cache was copied here ahead; their digest is `copied_digest`.
        preempted: How often it lost its blocks here.
    """

    engine_request_id: str
    token_ids: list[int]
    n_prompt: int
    max_output_tokens: int
    stop_token_ids: frozenset[int]
    last_output_tokens: int
    computed: int = 0
    digest: int = 0
    blocks: int = 0
    cut: bool = False
    ticket: SimulatedTicket | None = None
    pull_ends_s: float | None = None
    pull_before_s: float = math.inf
    copied_tokens: int = 0
    copied_digest: int = 0
    preempted: int = 0

    @property
    def n_output(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.n_prompt


@dataclass(slots=True)
class Pin:
    """A cut request's KV cache."""

    digest: int
    blocks: int
    expires_s: float


def batch_of(scheduled: list[tuple[Sequence, int]]) -> BatchFeatures:
    """What a step computes, by sequence and number of its tokens."""
    decoding = [s.computed + 1 for s, n_new in scheduled if s.n_output > 0 and n_new == 1]
    prompts = [(s.computed, n_new) for s, n_new in scheduled if s.n_output == 0 or n_new > 1]
    return BatchFeatures(
        n_decode=len(decoding),
        decode_kv_tokens=sum(decoding),
        decode_kv_tokens_max=max(decoding, default=0),
        prefill_tokens=sum(n for _, n in prompts),
        prefill_attention_tokens=sum(n * done + n * (n + 1) / 2 for done, n in prompts),
    )


def names_and_lengths(sequences: list[Sequence]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Their engine request ids, and their lengths in tokens."""
    return tuple(s.engine_request_id for s in sequences), tuple(len(s.token_ids) for s in sequences)
