"""
Pre-copy between simulated instances: what `engines/vllm/connector/precopy.py` does, on digests.

The source keeps the digest of a running request's full blocks under a lease; the target takes it over after the time of
a pull, and uses it if the ticket of the cut is of the same request and the same blocks. A request that was preempted
has other blocks (`SimulatedTicket.blocks_id`).
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cascadeinfer.engines.simulated.model import SimulatedTicket, fold
from cascadeinfer.engines.simulated.sequence import Pin, Sequence


class Source(Protocol):
    """The instance that is read from."""

    alive: bool
    precopies: "Precopies"


class Copied(NamedTuple):
    """KV cache of the first tokens of a request."""

    n_tokens: int
    digest: int


@dataclass(slots=True)
class _Copy:
    ticket: SimulatedTicket
    ends_s: float
    before_s: float
    digest: int | None = None
    done: bool | None = None


@dataclass(slots=True)
class Precopies:
    """One instance's part: what it has pinned for others, and what it reads from others."""

    pinned: dict[str, Pin] = field(default_factory=dict)
    _copies: dict[str, _Copy] = field(default_factory=dict)

    # --- at the source -----------------------------------------------------------------------------------------------

    def pin(self, sequence: Sequence, block_size: int, expires_s: float) -> int:
        """Pin the full blocks of a request that decodes; returns their tokens, 0 if there are none."""
        n_blocks = (len(sequence.token_ids) - 1) // block_size
        if sequence.n_output == 0 or sequence.computed < len(sequence.token_ids) - 1 or n_blocks == 0:
            return 0
        n_tokens = n_blocks * block_size
        self.pinned[sequence.engine_request_id] = Pin(fold(0, sequence.token_ids[:n_tokens]), n_blocks, expires_s)
        return n_tokens

    def expire(self, now_s: float) -> None:
        """End expired leases."""
        for request_id in [r for r, pin in self.pinned.items() if pin.expires_s <= now_s]:
            del self.pinned[request_id]

    def blocks(self, in_use: dict[str, int]) -> int:
        """Blocks that are held for peers alone, given how many each request and each cut request holds."""
        return sum(max(0, pin.blocks - in_use.get(request_id, 0)) for request_id, pin in self.pinned.items())

    # --- at the target -----------------------------------------------------------------------------------------------

    def begin(self, reservation_id: str, ticket: SimulatedTicket, ends_s: float, before_s: float) -> bool:
        """Read what the ticket names until `ends_s`; False if something is read into this reservation already."""
        if reservation_id in self._copies:
            return False
        self._copies[reservation_id] = _Copy(ticket, ends_s, before_s)
        return True

    def outcome(self, reservation_id: str, source: Source | None, now_s: float) -> bool | None:
        """Whether the copy is here; None while it is read. What is not pinned any more cannot be read in time."""
        copy = self._copies.get(reservation_id)
        if copy is None:
            return False
        if copy.done is None and now_s >= copy.ends_s:
            pin = source.precopies.pinned.get(copy.ticket.request_id) if source is not None and source.alive else None
            copy.digest = None if pin is None else pin.digest
            copy.done = pin is not None and now_s <= copy.before_s
        return copy.done

    def take(self, reservation_id: str, ticket: SimulatedTicket | None) -> Copied | None:
        """The reservation is given back: what was copied for the request that comes with this ticket, if anything."""
        copy = self._copies.pop(reservation_id, None)
        if copy is None or not copy.done or copy.digest is None or ticket is None:
            return None
        of_the_same = ticket.core_id == copy.ticket.core_id and ticket.request_id == copy.ticket.request_id
        if not of_the_same or ticket.blocks_id != copy.ticket.blocks_id or ticket.n_tokens < copy.ticket.n_tokens:
            return None
        return Copied(copy.ticket.n_tokens, copy.digest)

    @property
    def n_copies(self) -> int:
        """Copies under way, or waiting for their requests."""
        return len(self._copies)

    def keep_only(self, reservation_ids: set[str]) -> None:
        """Forget copies into reservations that are gone."""
        for reservation_id in self._copies.keys() - reservation_ids:
            del self._copies[reservation_id]
