"""
The decoding part of a batch, and its compiled fast path.

All members gain one token per step, so nothing per member changes: a member's length is `base + steps`, it ends at step
`finish`, and it needs a new block whenever `(base + steps - 1) % block_size == 0`. A run of steps in which no member
ends and blocks suffice therefore costs O(1) per step: the sums change by constants and the number of blocks needed is
looked up by `steps` modulo the block size. `cruise` carries out such a run with exactly the float operations of single
steps, so that the fast path and the slow one give identical times (a test compares them).
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.latency import step_time_s
from cascadeinfer.sim.requests import SimRequest

NEVER = 1 << 62


@njit(cache=True)
def summarise(
    base: NDArray[np.int64], finish: NDArray[np.int64], n: int, by_residue: NDArray[np.int64]
) -> tuple[int, int, int]:
    """
    Sum and maximum of `base` and minimum of `finish` over the first `n` members; fills the histogram of `base` modulo
    block size.

    Returns:
        (sum, maximum, minimum of finish); the maximum of no members is 0.
    """
    by_residue[:] = 0
    total = 0
    longest = -NEVER
    first = NEVER
    for i in range(n):
        total += base[i]
        longest = max(longest, base[i])
        first = min(first, finish[i])
        by_residue[base[i] % len(by_residue)] += 1
    return total, longest if n else 0, first


@njit(cache=True)
def cruise(
    coefficients: NDArray[np.float64],
    by_residue: NDArray[np.int64],
    n: int,
    base_sum: int,
    base_max: int,
    finish_min: int,
    steps: int,
    end_s: float,
    flight_s: float,
    busy_s: float,
    free_blocks: int,
    limit_s: float,
) -> tuple[int, float, float, float, int]:
    """
    Run pure decode steps from the one in flight until the limit, or until one whose end needs a decision.

    A step's end needs a decision when a member finishes with it or the next step's blocks are missing; that step is
    left in flight.

    Args:
        coefficients: Coefficients of the step time.
        by_residue: Members by `base` modulo block size.
        n: Members.
        base_sum: Sum of `base`.
        base_max: Maximum of `base`.
        finish_min: First step count at which a member finishes.
        steps: Steps done.
        end_s: When the step in flight ends.
        flight_s: Its duration.
        busy_s: Sum of the durations of steps done.
        free_blocks: Blocks that can be taken; those of the step in flight are taken already.
        limit_s: Steps that end after this stay in flight.

    Returns:
        (steps, end_s, flight_s, busy_s, blocks taken), as above, afterwards.
    """
    taken = 0
    block_size = len(by_residue)
    while end_s <= limit_s:
        done = steps + 1
        if done == finish_min:
            break
        needed = by_residue[(1 - done) % block_size]
        if taken + needed > free_blocks:
            break
        taken += needed
        busy_s += flight_s
        steps = done
        flight_s = step_time_s(coefficients, n, base_sum + n * steps, base_max + steps, 0.0, 0.0)
        end_s += flight_s
    return steps, end_s, flight_s, busy_s, taken


class DecodeBatch:
    """
    Decoding members, in compact arrays.

    Attributes:
        members: In no particular order (the last one fills a leaving member's place).
        steps: Decode steps done since the instance started; never reset.
        changes: Counts changes of membership, so that others can cache what depends on it.
    """

    __slots__ = (
        "base",
        "base_max",
        "base_sum",
        "block_size",
        "by_residue",
        "changes",
        "finish",
        "finish_min",
        "members",
        "seen",
        "steps",
    )

    def __init__(self, max_members: int, block_size: int) -> None:
        self.members: list[SimRequest] = []
        self.base = np.zeros(max_members, dtype=np.int64)
        self.finish = np.zeros(max_members, dtype=np.int64)
        self.by_residue = np.zeros(block_size, dtype=np.int64)
        self.block_size = block_size
        self.steps = 0
        self.changes = 0
        self.seen = -1
        self.base_sum = 0
        self.base_max = 0
        self.finish_min = NEVER

    def add(self, request: SimRequest) -> None:
        """Add a member whose `produced` is settled; it decodes from the next step on."""
        length = request.settled_tokens
        slot = len(self.members)
        request.base = length - self.steps
        request.slot = slot
        self.members.append(request)
        self.base[slot] = request.base
        self.finish[slot] = self.steps + request.output_tokens - request.produced
        self.changes += 1

    def remove(self, request: SimRequest) -> None:
        """Remove a member and settle its `produced`."""
        request.produced = self.length_of(request) - request.prompt_tokens
        last = self.members.pop()
        if last is not request:
            slot = request.slot
            self.members[slot] = last
            last.slot = slot
            self.base[slot] = last.base
            self.finish[slot] = self.finish[len(self.members)]
        request.slot = -1
        self.changes += 1

    def length_of(self, request: SimRequest) -> int:
        """Length of a member in tokens."""
        return request.base + self.steps

    def refresh(self) -> None:
        """Update the sums after a change of membership."""
        if self.seen != self.changes:
            self.base_sum, self.base_max, self.finish_min = summarise(
                self.base, self.finish, len(self.members), self.by_residue
            )
            self.seen = self.changes

    def blocks_needed(self) -> int:
        """New blocks that the next step's tokens need."""
        self.refresh()
        return int(self.by_residue[(1 - self.steps) % self.block_size])

    def crosses(self, request: SimRequest) -> bool:
        """Whether this member needs a new block in the next step."""
        return (self.length_of(request) - 1) % self.block_size == 0

    def finished(self) -> list[SimRequest]:
        """Members whose last token has come, in order of admission."""
        self.refresh()
        if self.steps < self.finish_min:
            return []
        ends = self.finish[: len(self.members)].tolist()
        over = [member for member, end in zip(self.members, ends, strict=True) if end == self.steps]
        return sorted(over, key=lambda request: request.admission) if len(over) > 1 else over
