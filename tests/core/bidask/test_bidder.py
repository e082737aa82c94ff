"""How an instance's agent answers while its instance is silent."""

from cascadeinfer.core.bidask.bidder import Bidder
from cascadeinfer.core.bidask.rounds import BidAskSettings, Outbox
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.events import InstanceJoined, InstanceSuspected, InstanceTrusted
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.messages import Accept, Ask, Award, Bid, Decline
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.core.view import ClusterView

CAPACITY = InstanceCapacity(kv_blocks=1000, block_size_tokens=16, max_num_seqs=16, max_batched_tokens=512)
ASK = Ask("b:1", "r", 100, MigrationReason.OUTGREW_STAGE.value, 0.5)


def test_no_place_is_offered_or_kept_on_a_silent_instance() -> None:
    """It declines asks and awards while its instance is suspected and another is not; afterwards it bids again."""
    view = ClusterView()
    for instance_id in "ab":
        view.apply(InstanceJoined("c", instance_id, InstanceKind(CAPACITY)))
    bidder = Bidder(view.instances["a"], BidAskSettings(), lambda: 0)
    out = Outbox()
    bidder.take_ask("b", ASK, 0.0, out)
    view.apply(InstanceSuspected("c", "a"))
    bidder.take_award("b", Award(ASK.ask_id, ASK.request_id, 100), 0.1, out)
    bidder.take_ask("b", ASK, 0.2, out)
    view.apply(InstanceSuspected("c", "b"))  # nobody answers: all are as good
    bidder.take_ask("b", ASK, 0.3, out)
    bidder.take_award("b", Award(ASK.ask_id, ASK.request_id, 100), 0.4, out)
    view.apply(InstanceTrusted("c", "a"))
    answers = [message for _, message in out.messages]
    assert [type(answer) for answer in answers] == [Bid, Decline, Decline, Bid, Accept]
    assert [answer.reason for answer in answers if isinstance(answer, Decline)] == ["suspect"] * 2
