"""
KV cache accounting of one instance: blocks as counts, shared prefixes as units.

A block is free, private to a request, or part of a *unit*: the blocks of one hashed piece of prompt (`blocks_per_unit`
each; a trace's hash may cover many blocks, in Mooncake's case 512 tokens). A unit in use is counted once, however many
requests share it. An unused unit stays cached and is evicted, least recently released first, when no plain free block
is left; this is vLLM's order too (its pool prepends uncached blocks to the free queue and appends cached ones). We
evict whole units, vLLM evicts blocks from the prefix's end, which differs only while a unit is half evicted.
"""

from collections import OrderedDict
from collections.abc import Sequence


class KvCache:
    """
    Blocks of one instance. `free_blocks` includes cached units, which can be evicted.

    Attributes:
        plain_free: Free blocks that cache nothing.
        cached: Unused units by hash, least recently released first.
        used_by: Units in use by hash, with the number of their users.
    """

    __slots__ = ("blocks", "blocks_per_unit", "cached", "plain_free", "used_by")

    def __init__(self, blocks: int, blocks_per_unit: int = 0) -> None:
        """
        Args:
            blocks: Total number of blocks.
            blocks_per_unit: Blocks that one prefix hash covers; 0 turns prefix caching off.
        """
        self.blocks = blocks
        self.blocks_per_unit = blocks_per_unit
        self.plain_free = blocks
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.used_by: dict[int, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken now."""
        return self.plain_free + len(self.cached) * self.blocks_per_unit

    def take(self, blocks: int) -> None:
        """Make free blocks private, evicting cached units as needed; there must be enough."""
        while self.plain_free < blocks:
            self.cached.popitem(last=False)
            self.plain_free += self.blocks_per_unit
        self.plain_free -= blocks

    def give(self, blocks: int) -> None:
        """Free private blocks."""
        self.plain_free += blocks

    def hits(self, hashes: Sequence[int], max_units: int) -> tuple[int, int]:
        """
        How much of a prompt is cached here.

        Returns:
            Leading units found (at most `max_units`), and how many of those are unused: holding them costs free blocks.
        """
        found = idle = 0
        for unit in hashes[:max_units]:
            if unit in self.cached:
                idle += 1
            elif unit not in self.used_by:
                break
            found += 1
        return found, idle

    def hold(self, hashes: Sequence[int]) -> None:
        """Become a user of units that are here."""
        for unit in hashes:
            if unit in self.cached:
                del self.cached[unit]
                self.used_by[unit] = 1
            else:
                self.used_by[unit] += 1

    def publish(self, unit: int) -> bool:
        """
        Share a unit that a request has computed in private blocks.

        Returns:
            Whether its blocks are the unit now; False when the hash is already here and the blocks stay private.
        """
        if unit in self.used_by or unit in self.cached:
            return False
        self.used_by[unit] = 1
        return True

    def release(self, hashes: Sequence[int]) -> None:
        """Stop using units; those without users stay cached, to be evicted from the prompt's end first."""
        for unit in reversed(hashes):
            users = self.used_by[unit] - 1
            if users:
                self.used_by[unit] = users
            else:
                del self.used_by[unit]
                self.cached[unit] = None
