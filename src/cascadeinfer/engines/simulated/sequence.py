"""A request as a simulated instance has it, and what it leaves behind when it is cut."""

import math
from dataclasses import dataclass

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
