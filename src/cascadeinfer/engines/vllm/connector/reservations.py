"""
Blocks reserved for requests that are about to arrive.

A reservation takes its blocks from the pool at once; the arriving request returns them just before it asks for its own.
A reservation that nobody claims expires.
"""

import time
from dataclasses import dataclass

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from cascadeinfer.engines.vllm.connector.ticket import reservation_prefix


@dataclass(slots=True)
class _Reservation:
    blocks: list[KVCacheBlock]
    expires_s: float
    for_parked: bool


class Reservations:
    """Reservations by id; ids of further front-end processes begin with their prefix."""

    def __init__(self, block_size: int, life_s: float) -> None:
        """Start empty; the pool is set later (`pool`)."""
        self.pool: BlockPool | None = None
        self._block_size = block_size
        self._life_s = life_s
        self._held: dict[str, _Reservation] = {}

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
        self._pool().free_blocks(reservation.blocks)
        return True

    def release_those_of(self, client_index: int) -> None:
        """Release the reservations of a front-end process that is gone."""
        prefix = reservation_prefix(client_index)
        for reservation_id in [r for r in self._held if r.startswith(prefix)]:
            self.release(reservation_id)

    def n_blocks(self) -> int:
        """Blocks held by all reservations."""
        return sum(len(reservation.blocks) for reservation in self._held.values())

    def _expire(self) -> None:
        now_s = time.monotonic()
        for reservation_id in [r for r, held in self._held.items() if held.expires_s <= now_s]:
            self.release(reservation_id)

    def _pool(self) -> BlockPool:
        assert self.pool is not None, "the scheduler has not bound its KV cache manager"
        return self.pool
