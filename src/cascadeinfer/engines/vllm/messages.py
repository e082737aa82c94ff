"""
Typed answers to an EngineCore's commands: `connector/commands.py` fills them in, `channel.py` reads them.

vLLM carries plain values only (msgpack), so answers are sent as dicts of the fields below. The receiver rejects a dict
that lacks a field or has one of another type.
"""

from typing import Any, Literal, Self, TypeAlias

import msgspec

ModelRunner: TypeAlias = Literal["V1", "V2"]
"""vLLM's two; what a request may keep across a move depends on them (`docs/migration.md`)."""


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A dict of plain values on its way."""

    def plain(self) -> dict[str, Any]:
        """To be sent."""
        return msgspec.structs.asdict(self)

    @classmethod
    def of(cls, told: Any) -> Self:
        """
        What was received.

        Raises:
            msgspec.ValidationError: It is not of this form: the other end is of another version.
        """
        return msgspec.convert(told, cls)


class EngineHello(_Answer, frozen=True):
    """
    Who an instance is.

    Attributes:
        engine_id: Another one after each start.
        host, port: Its side channel, where peers shake hands.
        tp_size: Ranks that hold a part of its KV cache each.
        block_size: Tokens in a KV block.
        kv_blocks: How many blocks requests can have.
        max_model_len: Tokens in the longest sequence it takes.
        movable: Whether running requests can move at all.
        model_runner: What its workers run the model with.
        clock_s: Its monotonic clock.
    """

    engine_id: str
    host: str
    port: int
    tp_size: int
    block_size: int
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    max_model_len: int
    movable: bool
    model_runner: ModelRunner
    clock_s: float


class EngineLoad(_Answer, frozen=True):
    """
    What an instance has now, as one of its clients sees it.

    Attributes:
        running, waiting: The client's own requests: id and length in tokens.
        foreign_running, foreign_waiting: Lengths of the other clients' requests.
        pinned: Ids of the cut requests whose blocks are pinned.
        held_blocks: Blocks that no request runs or waits with, by what holds them.
        timed_steps: Steps since the client last asked: the fields of a `BatchFeatures`, and seconds.
        steps, scheduled_tokens, pulls, pulled_tokens, precopied_tokens, failed_pulls: Since its start.
        listens: Whether its side channel is open.
        paused: Whether its scheduler is paused, in any of vLLM's ways.
        step_budget: Tokens of a step at most.
        clock_s: Its monotonic clock.
    """

    running: list[tuple[str, int]]
    waiting: list[tuple[str, int]]
    foreign_running: list[int]
    foreign_waiting: list[int]
    kv_blocks: int
    kv_blocks_used: int
    reserved: int
    pinned: list[str]
    held_blocks: dict[str, int]
    steps: int
    timed_steps: list[tuple[int, int, int, int, float, float]]
    scheduled_tokens: int
    pulls: int
    pulled_tokens: int
    precopied_tokens: int
    failed_pulls: int
    listens: bool
    paused: bool
    step_budget: int
    clock_s: float
