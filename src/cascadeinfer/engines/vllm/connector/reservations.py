"""
Blocks reserved for requests that are about to arrive.

A reservation takes its blocks from the pool at once; the arriving request returns them just before it asks for its own.
A reservation that nobody claims expires. Blocks into which a read is under way (`precopy.py`) stay out of the pool
until it is over, even if their reservation is released.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from cascadeinfer.engines.vllm.connector.ticket import reservation_prefix


@dataclass(slots=True)
class _Reservation:
    blocks: list[KVCacheBlock]
    expires_s: float
    for_parked: bool
    is_read_into: bool = False


class Reservations:
    """Reservations by id; ids of further front-end processes begin with their prefix."""

    def __init__(self, block_size: int, life_s: float) -> None:
        """
        Start empty; the pool is set later (`pool`).

        Attributes:
            on_gone: Called with each reservation that is released, taken over or expired.
        """
        self.pool: BlockPool | None = None
        self.on_gone: Callable[[str], None] | None = None
        self._block_size = block_size
        self._life_s = life_s
        self._held: dict[str, _Reservation] = {}
        #: Blocks of released reservations into which a read is still under way.
        self._written: dict[str, list[KVCacheBlock]] = {}

    def __len__(self) -> int:
        """Number of reservations that hold blocks now."""
        self._expire()
        return len(self._held)

    def n_of_migrations(self) -> int:
        """Number of those for requests that are not parked."""
        self._expire()
        return sum(not reservation.for_parked for reservation in self._held.values())

    def is_for_parked(self, reservation_id: str) -> bool:
        """Whether there is such a reservation, and it is for a parked request."""
        reservation = self._held.get(reservation_id)
        return reservation is not None and reservation.for_parked

    def reserve(self, reservation_id: str, n_tokens: int, *, spoken_for: int = 0, for_parked: bool = False) -> bool:
        """
        Reserve blocks for a request of this many tokens, plus one; False when they are not free.

        Args:
            reservation_id: Of the reservation; one that exists already is kept.
            n_tokens: Length to reserve room for.
            spoken_for: Free blocks that others will need; vLLM leaves as many free when a pull asks for its blocks.
            for_parked: Whether the request is parked, so that its move does not count as a migration.
        """
        self._expire()
        if reservation_id in self._held:
            return True
        n_blocks = -(-n_tokens // self._block_size) + 1
        pool = self._pool()
        if pool.get_num_free_blocks() - spoken_for < n_blocks:
            return False
        blocks, expires_s = pool.get_new_blocks(n_blocks), time.monotonic() + self._life_s
        self._held[reservation_id] = _Reservation(blocks, expires_s, for_parked)
        return True

    def release(self, reservation_id: str) -> bool:
        """Release reserved blocks; False when there is no such reservation."""
        reservation = self._held.pop(reservation_id, None)
        if reservation is None:
            return False
        if reservation.is_read_into:
            self._written[reservation_id] = reservation.blocks
        else:
            self._pool().free_blocks(reversed(reservation.blocks))  # the end of a prefix is the first to be evicted
        if self.on_gone is not None:
            self.on_gone(reservation_id)
        return True

    def begin_read(self, reservation_id: str, n_blocks: int) -> list[int] | None:
        """The ids of its first blocks, to be read into; None if there are not as many, or nothing could be cached."""
        self._expire()
        reservation = self._held.get(reservation_id)
        if reservation is None or n_blocks > len(reservation.blocks) or not self._pool().enable_caching:
            return None
        reservation.is_read_into = True
        return [block.block_id for block in reservation.blocks[:n_blocks]]

    def end_read(self, reservation_id: str) -> bool:
        """Nothing will write into its blocks any more; False if the reservation itself is gone already."""
        if (blocks := self._written.pop(reservation_id, None)) is not None:
            self._pool().free_blocks(blocks)
            return False
        self._held[reservation_id].is_read_into = False
        return True

    def cache(self, reservation_id: str, request: Request, n_blocks: int) -> None:
        """Its first blocks hold the KV cache of this request's first tokens: let them enter the prefix cache."""
        blocks = self._held[reservation_id].blocks
        self._pool().cache_full_blocks(request, blocks, 0, n_blocks, self._block_size, 0)

    def release_those_of(self, client_index: int) -> None:
        """Release the reservations of a front-end process that is gone."""
        prefix = reservation_prefix(client_index)
        for reservation_id in [r for r in self._held if r.startswith(prefix)]:
            self.release(reservation_id)

    def n_blocks(self) -> int:
        """Blocks held by all reservations, released ones included whose blocks are still read into."""
        held = sum(len(reservation.blocks) for reservation in self._held.values())
        return held + sum(map(len, self._written.values()))

    def _expire(self) -> None:
        now_s = time.monotonic()
        for reservation_id in [r for r, held in self._held.items() if held.expires_s <= now_s]:
            self.release(reservation_id)

    def _pool(self) -> BlockPool:
        assert self.pool is not None, "the scheduler has not bound its KV cache manager"
        return self.pool
