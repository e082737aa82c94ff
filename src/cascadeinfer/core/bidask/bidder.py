"""
The bidder's side of an instance's agent: what it offers to take, and the places it keeps.

A bid reserves its room until it is awarded, withdrawn or expired, and every later bid takes these reservations into
account, so two askers cannot win the same place. The award checks again, because requests have grown and arrived
meanwhile. See `rounds.py`.
"""

from collections.abc import Callable
from typing import Final

from cascadeinfer.core.bidask.rounds import NEVER, BidAskSettings, Outbox, Round, RoundEvent, State
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.messages import Accept, Ask, Award, Bid, Decline, Withdraw
from cascadeinfer.core.migration import ROOM_SLACK_TOKENS
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import InstanceView

BUSY: Final = "busy"
"""The only reason to decline that passes within a fraction of a second."""


class Bidder:
    """
    One instance as bidder.

    Attributes:
        offers: Rounds that are not closed, by ask id.
    """

    def __init__(self, own: InstanceView, settings: BidAskSettings, slots_taken: Callable[[], int]) -> None:
        """
        Args:
            own: The instance.
            settings: Numbers of the protocol.
            slots_taken: This instance's migrations, kept places and awards under way.
        """
        self.offers: dict[str, Round] = {}
        self._own = own
        self._settings = settings
        self._slots_taken = slots_taken

    @property
    def kept(self) -> int:
        """Places kept for migrations that have not begun."""
        return sum(offer.state is State.KEEPING for offer in self.offers.values()) if self.offers else 0

    def take_ask(self, sender_id: InstanceId, ask: Ask, now_s: float, out: Outbox) -> None:
        """Bid or decline."""
        if ask.ask_id in self.offers:
            return  # a duplicate
        refusal = self._refusal(ask.length_tokens)
        load = self._load_with(ask.length_tokens)
        if refusal is None and ask.reason == MigrationReason.REBALANCE.value and load >= ask.load:
            refusal = "no_gain"
        if refusal is not None:
            out.messages.append((sender_id, Decline(ask.ask_id, refusal)))
            return
        held = self._held()
        price = self._own.price_with(len(held), sum(held))
        bid = Bid(ask.ask_id, load, self._free_blocks(), self._own.migrations, price)
        offer = Round(ask.ask_id, ask.request_id, ask.length_tokens, MigrationReason(ask.reason), sender_id)
        offer.handle(RoundEvent.ASKED)
        offer.deadline_s = now_s + self._settings.offer_life_s
        self.offers[ask.ask_id] = offer
        out.messages.append((sender_id, bid))

    def take_award(self, sender_id: InstanceId, award: Award, now_s: float, out: Outbox) -> None:
        """Keep the place if it is still there."""
        offer = self.offers.get(award.ask_id)
        if offer is None:
            out.messages.append((sender_id, Decline(award.ask_id, "expired")))
            return
        if offer.state is not State.OFFERING or offer.partner_id != sender_id:
            return  # a duplicate
        del self.offers[award.ask_id]  # its own reservation must not count against it
        refusal = self._refusal(award.length_tokens)
        if refusal is not None:
            offer.handle(RoundEvent.ROOM_GONE)
            out.messages.append((sender_id, Decline(award.ask_id, refusal)))
            return
        self.offers[award.ask_id] = offer
        offer.handle(RoundEvent.AWARDED)
        offer.deadline_s = now_s + self._settings.keep_life_s
        out.messages.append((sender_id, Accept(award.ask_id)))

    def take_withdraw(self, sender_id: InstanceId, message: Withdraw) -> None:
        """Release the place, unless the migration has begun."""
        offer = self.offers.get(message.ask_id)
        if offer is not None and offer.partner_id == sender_id and offer.state is not State.RECEIVING:
            self._close(offer, RoundEvent.WITHDRAWN)

    def move_began(self, ask_id: str) -> None:
        """Handle the start of a migration to this instance."""
        offer = self.offers.get(ask_id)
        if offer is not None and offer.state is State.KEEPING:
            offer.handle(RoundEvent.BEGAN)
            offer.deadline_s = NEVER

    def move_ended(self, ask_id: str) -> None:
        """Handle the end of a migration to this instance, whatever its outcome."""
        offer = self.offers.get(ask_id)
        if offer is not None and offer.state is State.RECEIVING:
            self._close(offer, RoundEvent.ENDED)

    def wake(self, now_s: float) -> None:
        """Release what was not claimed in time."""
        for offer in [o for o in self.offers.values() if o.deadline_s <= now_s]:
            self._close(offer, RoundEvent.EXPIRED)

    def next_wake_s(self) -> float:
        """The earliest deadline; infinite when there is none."""
        return min([o.deadline_s for o in self.offers.values()], default=NEVER)

    def _close(self, offer: Round, event: RoundEvent) -> None:
        offer.handle(event)
        del self.offers[offer.ask_id]

    def _refusal(self, length_tokens: int) -> str | None:
        """Why this instance cannot take a request of this length now; None if it can."""
        own = self._own
        if own.draining:
            return "draining"
        if own.shunned:
            return "suspect"
        if self._slots_taken() >= self._settings.max_migrations:
            return BUSY
        if own.committed_requests + len(self._held()) >= own.capacity.max_num_seqs:
            return Refusal.NO_SLOT.value
        needed = own.capacity.blocks_for(length_tokens + ROOM_SLACK_TOKENS)
        headroom = self._settings.headroom_blocks + own.committed_requests
        return Refusal.NO_BLOCKS.value if self._free_blocks() - headroom < needed else None

    def _held(self) -> list[int]:
        """Lengths of the requests that room is reserved for."""
        return [o.length_tokens for o in self.offers.values() if o.state is not State.RECEIVING]

    def _free_blocks(self) -> int:
        return self._own.free_blocks() - sum(map(self._own.capacity.blocks_for, self._held()))

    def _load_with(self, length_tokens: int) -> float:
        """The load after taking a request of this length and everything that room is reserved for."""
        own = self._own
        held = self._held()
        tokens = own.committed_kv_tokens + length_tokens + sum(held)
        requests = own.committed_requests + 1 + len(held)
        return max(tokens / own.capacity.kv_tokens, requests / own.capacity.max_num_seqs)
