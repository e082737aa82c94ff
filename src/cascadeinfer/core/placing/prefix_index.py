"""
An approximate radix tree over prompts: which instance has probably cached which prefix.

Each hash of a prompt's block covers all blocks before it, so a hash names a node of the tree and a prompt is a path; a dict from hash to
instances is the whole tree. A node remembers when it was last used; beyond `max_blocks` the least recently used nodes go. A prompt's nodes
are touched from the leaf to the root, so a parent is always younger than its children and leaves go first.
"""

from collections.abc import Sequence

from cascadeinfer.core.types import InstanceId


class PrefixIndex:
    """See the module header."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._nodes: dict[int, dict[InstanceId, None]] = {}
        self._blocks = 0

    def __len__(self) -> int:
        """Blocks remembered, counted once per instance."""
        return self._blocks

    def match(self, hashes: Sequence[int]) -> tuple[int, InstanceId | None]:
        """
        The longest known prefix.

        Returns:
            Its blocks, and the instance that used it last; 0 and None when nothing is known.
        """
        matched = 0
        instance_id: InstanceId | None = None
        for value in hashes:
            node = self._nodes.get(value)
            if not node:
                break
            matched += 1
            instance_id = next(reversed(node))
        return matched, instance_id

    def matches(self, hashes: Sequence[int]) -> dict[InstanceId, int]:
        """Per instance that has used any of it, the blocks of the longest prefix that it has used whole."""
        matched: dict[InstanceId, int] = {}
        holders: set[InstanceId] = set(self._nodes.get(hashes[0], ())) if hashes else set()
        for depth, value in enumerate(hashes):
            node = self._nodes.get(value, {})
            gone = {instance_id for instance_id in holders if instance_id not in node}
            if gone:
                matched.update(dict.fromkeys(gone, depth))
                holders -= gone
            if not holders:
                return matched
        matched.update(dict.fromkeys(holders, len(hashes)))
        return matched

    def add(self, hashes: Sequence[int], instance_id: InstanceId) -> None:
        """A prompt with these blocks went to this instance."""
        for value in reversed(hashes):
            node = self._nodes.pop(value, None)  # put back as the youngest
            if node is None:
                node = {}
            if instance_id in node:
                del node[instance_id]
            else:
                self._blocks += 1
            node[instance_id] = None
            self._nodes[value] = node
        while self._blocks > self._max_blocks:
            oldest = next(iter(self._nodes))
            self._blocks -= len(self._nodes.pop(oldest))

    def forget(self, instance_id: InstanceId) -> None:
        """An instance is gone, and its cache with it."""
        for value in list(self._nodes):
            node = self._nodes[value]
            if instance_id in node:
                del node[instance_id]
                self._blocks -= 1
                if not node:
                    del self._nodes[value]
