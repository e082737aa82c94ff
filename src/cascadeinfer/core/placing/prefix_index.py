"""
An approximate radix tree over prompts: which instance has probably cached which prefix.

The hash of a prompt's block covers all blocks before it, so a hash names a node of the tree and a prompt is a path; a
dict from hash to instances represents the whole tree. When more than `max_blocks` are stored, the least recently used
nodes are evicted. Nodes of a prompt are touched from leaf to root, so a parent is always more recent than its children,
and leaves are evicted first.
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
        """Number of blocks stored, counted once per instance."""
        return self._blocks

    def match(self, hashes: Sequence[int]) -> tuple[int, InstanceId | None]:
        """
        Find the longest known prefix.

        Returns:
            Its length in blocks and the instance that used it last; 0 and None when nothing matches.
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
        """For each instance that has used the first block: the length, in blocks, of the longest prefix it has used."""
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
        """Record that a prompt with these blocks went to this instance."""
        for value in reversed(hashes):
            node = self._nodes.pop(value, None)  # re-inserted as the most recent
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
        """Forget an instance that is gone, together with its cache."""
        for value in list(self._nodes):
            node = self._nodes[value]
            if instance_id in node:
                del node[instance_id]
                self._blocks -= 1
                if not node:
                    del self._nodes[value]
