"""
How fast KV cache goes between nodes, from the moves that have ended.

    seconds per token (source's node, target's node) = median over the last moves between them
    extra seconds of a move = tokens * waited * (seconds per token between these nodes - the least between any two)
    waited = share of its tokens for which a request waits, because they are not copied ahead; median, too

The rates are those of pairs of nodes, not of instances: all instances of a node share its links, so a few moves are
enough to know them, however many instances there are. Moves within a node are a pair, too. Only links that are slower
than the best by `FAR_FROM` are *far* and cost extra: pulls differ by their size, by what the target has cached and by
what else it does, and noise must decide nothing. On one node there is one pair and nothing is far. A pair that has not
been measured counts as near, so it is tried.
"""

from collections import deque
from statistics import median
from typing import Final, NamedTuple

from cascadeinfer.core.types import InstanceId, NodeId

PULLS_KEPT: Final = 8
"""Per pair of nodes."""
PULLS_NEEDED: Final = 2
"""With fewer, nothing is known."""
LEAST_TOKENS: Final = 256
"""A smaller pull says more about steps and messages than about the link."""
FAR_FROM: Final = 2.0


class Link(NamedTuple):
    """From one node to another: tokens of KV cache per second, in how many moves it was seen, and whether it is far."""

    source: NodeId
    target: NodeId
    tokens_per_s: float
    n_pulls: int
    is_far: bool


class Links:
    """See the module header."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._nodes: dict[InstanceId, NodeId] = {}
        self._pulls: dict[tuple[NodeId, NodeId], deque[float]] = {}
        self._waited: dict[tuple[NodeId, NodeId], deque[float]] = {}
        self._s_per_token: dict[tuple[NodeId, NodeId], float] = {}
        self._least = 0.0

    def joined(self, instance_id: InstanceId, node: NodeId) -> None:
        """An instance is on this node; empty where that is not known."""
        if node != self._nodes.get(instance_id):
            self.left(instance_id)
        if node:
            self._nodes[instance_id] = node

    def left(self, instance_id: InstanceId) -> None:
        """An instance is gone; with the last one of a node, so are the node's links."""
        node = self._nodes.pop(instance_id, None)
        if node is None or node in self._nodes.values():
            return
        for key in [key for key in self._pulls if node in key]:
            del self._pulls[key], self._waited[key]
            self._s_per_token.pop(key, None)
        self._least = min(self._s_per_token.values(), default=0.0)

    def knows(self, instance_id: InstanceId) -> bool:
        """Whether it is known where an instance is."""
        return instance_id in self._nodes

    def pulled(
        self, source_id: InstanceId, target_id: InstanceId, pulled_tokens: int, pull_s: float, copied_tokens: int = 0
    ) -> None:
        """
        Record a move; ignored if its pull is small or where a node is not known.

        Args:
            source_id: From where.
            target_id: To where.
            pulled_tokens: Tokens that were pulled.
            pull_s: Seconds that it took; if some were copied before the cut, that these took.
            copied_tokens: How many were copied before the cut.
        """
        tokens = copied_tokens or pulled_tokens
        if tokens < LEAST_TOKENS or pull_s <= 0.0 or (key := self._key(source_id, target_id)) is None:
            return
        pulls = self._pulls.setdefault(key, deque(maxlen=PULLS_KEPT))
        pulls.append(pull_s / tokens)
        waited = self._waited.setdefault(key, deque(maxlen=PULLS_KEPT))
        waited.append(max(0, pulled_tokens - copied_tokens) / pulled_tokens)
        if len(pulls) >= PULLS_NEEDED:
            self._s_per_token[key] = median(pulls)
            self._least = min(self._s_per_token.values())

    def pull_s(self, source_id: InstanceId, target_id: InstanceId, tokens: int) -> float | None:
        """How long a pull of so many tokens takes, as far as moves between their nodes have shown; None if none has."""
        key = self._key(source_id, target_id)
        s_per_token = None if key is None else self._s_per_token.get(key)
        return None if s_per_token is None else tokens * s_per_token

    def extra_s(self, source_id: InstanceId, target_id: InstanceId, tokens: int) -> float:
        """How much longer a request of so many tokens waits than over the best link; 0.0 unless the link is far."""
        if len(self._s_per_token) < 2 or (key := self._key(source_id, target_id)) is None:
            return 0.0
        s_per_token = self._s_per_token.get(key, 0.0)
        if key not in self._s_per_token or s_per_token < FAR_FROM * self._least:
            return 0.0
        return tokens * median(self._waited[key]) * (s_per_token - self._least)

    def known(self) -> list[Link]:
        """All links that are known, by their nodes' names."""
        return [
            Link(*key, 1.0 / s_per_token, len(self._pulls[key]), s_per_token >= FAR_FROM * self._least)
            for key, s_per_token in sorted(self._s_per_token.items())
        ]

    def _key(self, source_id: InstanceId, target_id: InstanceId) -> tuple[NodeId, NodeId] | None:
        source, target = self._nodes.get(source_id), self._nodes.get(target_id)
        return None if source is None or target is None else (source, target)
