"""
Identifiers and small value types that every layer shares.

Ids are opaque strings chosen by the shell; nothing in the core makes one from a counter. Lengths are in tokens and
ranges are half-open, `[lo, hi)`.
"""

from dataclasses import dataclass, replace
from typing import Final, TypeAlias

InstanceId: TypeAlias = str
RequestId: TypeAlias = str
MigrationId: TypeAlias = str
NodeId: TypeAlias = str
"""A machine that instances run on; empty where that is not known."""

UNBOUNDED_TOKENS: Final = 1 << 40
"""`hi` of the last stage's range: longer than any context."""


@dataclass(frozen=True, slots=True, order=True)
class LengthRange:
    """
    A half-open range of sequence lengths, `[lo_tokens, hi_tokens)`.

    Raises:
        ValueError: The range is empty or negative.

    """

    lo_tokens: int
    hi_tokens: int = UNBOUNDED_TOKENS

    def __post_init__(self) -> None:
        """Refuse empty and negative ranges."""
        if not 0 <= self.lo_tokens < self.hi_tokens:
            raise ValueError(f"length range [{self.lo_tokens}, {self.hi_tokens}) is empty or negative")

    def __contains__(self, length_tokens: int) -> bool:
        """Whether a sequence of this length belongs to the range."""
        return self.lo_tokens <= length_tokens < self.hi_tokens

    def __str__(self) -> str:
        """The form the command line takes: `0-512`, `512-`."""
        return f"{self.lo_tokens}-{'' if self.hi_tokens >= UNBOUNDED_TOKENS else self.hi_tokens}"


@dataclass(frozen=True, slots=True)
class InstanceCapacity:
    """
    Capacity of one instance; all but the token budget is fixed while it lives.

    Attributes:
        kv_blocks: KV cache blocks in total.
        block_size_tokens: Tokens per block.
        max_num_seqs: Requests that may run (not wait) at once.
        max_batched_tokens: Token budget of one step (vLLM's max_num_batched_tokens).
    """

    kv_blocks: int
    block_size_tokens: int
    max_num_seqs: int
    max_batched_tokens: int

    @property
    def kv_tokens(self) -> int:
        """KV capacity in tokens."""
        return self.kv_blocks * self.block_size_tokens

    def with_token_budget(self, max_batched_tokens: int) -> "InstanceCapacity":
        """
        The same instance with another token budget of a step.

        No more requests run at once than the budget has tokens, as vLLM sees to itself when only the budget is set
        (`arg_utils.py`, `_set_default_max_num_seqs_and_batched_tokens_args`).
        """
        return replace(
            self, max_batched_tokens=max_batched_tokens, max_num_seqs=min(self.max_num_seqs, max_batched_tokens)
        )

    def blocks_for(self, length_tokens: int) -> int:
        """Blocks that a sequence of this length occupies."""
        return -(-length_tokens // self.block_size_tokens)
