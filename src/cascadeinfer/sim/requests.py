"""
A request in the simulator: its data from the trace, its place and its progress.

While a request decodes in a batch, its length is `base + steps of the batch` (see `sim/batch.py`) and `produced` is
stale; taking it out of the batch updates it.
"""

import enum
import math
from dataclasses import dataclass, field

from cascadeinfer.core.types import InstanceId, RequestId


class Phase(enum.Enum):
    """Phase of a request in its life."""

    UNPLACED = "unplaced"
    """It waits for the policy."""
    WAITING = "waiting"
    """In an instance's queue."""
    PREFILL = "prefill"
    """Running; its prompt (or what must be recomputed) is not done."""
    DECODE = "decode"
    """Running; one token per step."""
    PARKED = "parked"
    """It has its first token and waits for a target, its blocks pinned (`core/parking.py`)."""
    PULLING = "pulling"
    """Cut at the source; the target has allocated its blocks and its KV cache is in transit."""
    JOINING = "joining"
    """Its KV cache is at the target; it decodes from the next step on."""
    FINISHED = "finished"
    REJECTED = "rejected"
    ABORTED = "aborted"


OVER = frozenset({Phase.FINISHED, Phase.REJECTED, Phase.ABORTED})


@dataclass(slots=True, eq=False)
class SimRequest:
    """
    One request.

    Attributes:
        row: Row in the trace.
        produced: Output tokens delivered; stale while decoding.
        base: Length minus the batch's steps, while decoding.
        slot: Index in the batch, while decoding.
        computed: Tokens with KV cache, while prefilling.
        goal: Tokens to compute before the next token: the length when it was queued.
        blocks: Blocks it holds while prefilling, shared units included.
        units: Hashes of the shared units it uses.
        admission: Number of its last admission; higher is later.
        instance_id: Where it is, or was sent; None while it waits for the policy.
        lost_tokens: Tokens already computed when it last left a batch, or a prompt unfinished; recomputing them is
            waste.
        watched: Whether a migration waits for its next token.
        armed: Whether it is to be parked with its first token.
        dispatched_s: When the policy first placed it; followed by the times of its first run, first token and end.
    """

    request_id: RequestId
    row: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    priority: int = 0
    phase: Phase = Phase.UNPLACED
    instance_id: InstanceId | None = None
    produced: int = 0
    base: int = 0
    slot: int = -1
    computed: int = 0
    goal: int = 0
    blocks: int = 0
    units: list[int] = field(default_factory=list)
    admission: int = -1
    watched: bool = False
    armed: bool = False
    dispatched_s: float = math.nan
    scheduled_s: float = math.nan
    first_token_s: float = math.nan
    finish_s: float = math.nan
    preemptions: int = 0
    migrations: int = 0
    lost_tokens: int = 0
    recomputed_tokens: int = 0
    prefix_hit_tokens: int = 0

    @property
    def settled_tokens(self) -> int:
        """Length (prompt and output so far) when it is not decoding."""
        return self.prompt_tokens + self.produced
