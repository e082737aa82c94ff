"""
The simulated model and the records for requests and outputs: no state, no time.

The KV cache of a sequence is the digest of the tokens that it was computed from, and the next token is a function of
the digest. A lost, repeated or reordered token, or another request's KV cache, therefore changes every token that
follows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.engines.protocol import InstanceIdentity

VOCABULARY: Final = 32_000
_MASK: Final = (1 << 64) - 1
_MULTIPLIER: Final = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, as in Fibonacci hashing."""
IDENTITY: Final = InstanceIdentity(
    EngineIdentity(
        engine="simulated",
        engine_version="1",
        model="digest",
        architecture="Digest",
        layers=2,
        hidden_size=64,
        query_heads=4,
        kv_heads=2,
        head_size=16,
        vocabulary=VOCABULARY,
        experts=0,
        dtype="float32",
        kv_cache_dtype="auto",
        quantization="none",
        tensor_parallel=1,
        pipeline_parallel=1,
        device="nothing",
        threads=1,
        attention_backend="NONE",
        eager=True,
        asynchronous=False,
    ),
    kv_bytes_per_token=1_000,
    multiprocessors=None,
)


def fold(digest: int, token_ids: Iterable[int]) -> int:
    """The digest after computing these tokens too."""
    for token_id in token_ids:
        digest = ((digest ^ (token_id + 1)) * _MULTIPLIER) & _MASK
        digest ^= digest >> 29
    return digest


def next_token(digest: int) -> int:
    """The token that follows a sequence with this digest."""
    return digest % VOCABULARY


def generate(prompt_token_ids: list[int], max_tokens: int, stop_token_ids: Iterable[int] = ()) -> list[int]:
    """What every undisturbed instance generates for this prompt."""
    stops = frozenset(stop_token_ids)
    digest = fold(0, prompt_token_ids)
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token(digest))
        if output[-1] in stops:
            break
        digest = fold(digest, output[-1:])
    return output


@dataclass(frozen=True, slots=True)
class SimulatedParams:
    """The payload of a simulated request: tokens that end it."""

    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class SimulatedTicket:
    """
    See `cascadeinfer.engines.protocol.KvTicket`: whose KV cache it is, and at which life of which instance.

    Attributes:
        blocks_id: How often the request has got other blocks.
    """

    core_id: str
    request_id: str
    n_tokens: int
    blocks_id: int = 0


@dataclass(slots=True)
class SimulatedDelta:
    """See `cascadeinfer.engines.protocol.TokenDelta`; `finish_reason` is `stop`, `length`, `abort` or `error`."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    kv_transfer_params: SimulatedTicket | None = None
    events: Any = None


@dataclass(frozen=True, slots=True)
class SimulatedTimes:
    """
    Durations, in seconds.

    Attributes:
        step_s: One step, unless there is a `step_model`.
        step_model: Duration of a step by its batch; None for `step_s`.
        start_s: From start to ready.
        pull_s: A pull, whatever its size.
        lease_s: How long a cut request's blocks stay pinned unless the puller renews the lease.
        notice_s: From an instance's death until its client knows.
    """

    step_s: float = 0.01
    start_s: float = 1.0
    pull_s: float = 0.015
    lease_s: float = 10.0
    notice_s: float = 0.02
    step_model: StepModel | None = None
