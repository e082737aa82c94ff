"""
Blocks that are held for requests that are about to arrive.

Whoever reserves takes the blocks from the pool at once; the request that arrives gives them back just before it asks for
its own. A reservation that nobody claims ends by itself.
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


class Reservations:
    """By id; ids of further front-end processes begin with their prefix."""

    def __init__(self, block_size: int, life_s: float) -> None:
        """None yet; the pool comes later (`pool`)."""
        self.pool: BlockPool | None = None
        self._block_size = block_size
        self._life_s = life_s
        self._held: dict[str, _Reservation] = {}

    def __len__(self) -> int:
        """Those that hold blocks now."""
        self._expire()
        return len(self._held)

    def reserve(self, reservation_id: str, n_tokens: int, *, spoken_for: int = 0) -> bool:
        """
        Hold blocks for a request of this many tokens (one more than it fills); False when they are not free.

        Args:
            reservation_id: Of the reservation; an id that is held already is held on.
            n_tokens: Length for which there shall be room.
            spoken_for: Free blocks that others will need, which vLLM leaves free when a pull asks for its blocks.
        """
        self._expire()
        if reservation_id in self._held:
            return True
        n_blocks = -(-n_tokens // self._block_size) + 1
        pool = self._pool()
        if pool.get_num_free_blocks() - spoken_for < n_blocks:
            return False
        self._held[reservation_id] = _Reservation(pool.get_new_blocks(n_blocks), time.monotonic() + self._life_s)
        return True

    def release(self, reservation_id: str) -> bool:
        """Give reserved blocks back; False when there is no such reservation."""
        reservation = self._held.pop(reservation_id, None)
        if reservation is None:
            return False
        self._pool().free_blocks(reservation.blocks)
        return True

    def release_those_of(self, client_index: int) -> None:
        """A front-end process is gone: nobody will claim what it reserved."""
        prefix = reservation_prefix(client_index)
        for reservation_id in [r for r in self._held if r.startswith(prefix)]:
            self.release(reservation_id)

    def n_blocks(self) -> int:
        """Blocks that they hold."""
        return sum(len(reservation.blocks) for reservation in self._held.values())

    def _expire(self) -> None:
        now_s = time.monotonic()
        for reservation_id in [r for r, held in self._held.items() if held.expires_s <= now_s]:
            self.release(reservation_id)

    def _pool(self) -> BlockPool:
        assert self.pool is not None, "the scheduler has not bound its KV cache manager"
        return self.pool
