"""
Pre-copy, beside the scheduler: the full blocks of a running request go ahead while it decodes, and its pause carries
only the rest.

A full block never changes while its request lives, so it can be read at any time, provided that nobody else gets it
meanwhile. The source therefore counts itself among its users for the length of a lease (`FullBlockPins`), whatever
becomes of the request. The target reads into blocks that it has reserved for the request (`Precopies`). When the
request comes, with the ticket of its cut, these blocks enter the prefix cache under the hashes of its own tokens, and
the pull asks only for what is not cached, as it always does. They enter it only if

- every rank saw its read complete before the deadline, so the source still held the blocks;
- the ticket names the same engine and the same blocks in the same places: the source confirms that they are this
  request's. One that was preempted and computed anew in other blocks is pulled as a whole.

Blocks that a read may still write into are not given back to the pool, even if their reservation is released.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from cascadeinfer.engines.vllm.connector.reservations import Reservations
from cascadeinfer.engines.vllm.connector.ticket import TransferParams
from cascadeinfer.engines.vllm.connector.words import WordsError, check_ticket


def precopy_ticket(side: NixlPullConnectorScheduler, request_id: str, block_ids: list[int]) -> TransferParams:
    """Where these full blocks of a running request are, in the form of a ticket."""
    parallel = side.vllm_config.parallel_config
    return {
        "remote_block_ids": (block_ids,),
        "remote_num_tokens": len(block_ids) * side.block_size,
        "remote_engine_id": side.engine_id,
        "remote_request_id": request_id,
        "remote_host": side.side_channel_host,
        "remote_port": side.side_channel_port,
        # vLLM 0.33 counts how often an engine has registered its KV cache; 0.32 does so once.
        "remote_registration_generation": getattr(side, "_registration_generation", 0),
        "tp_size": side.transfer_tp_size,
        "dcp_size": parallel.decode_context_parallel_size,
        "pp_size": parallel.pipeline_parallel_size,
    }


class FullBlockPins:
    """At the source: full blocks of running requests that a peer may read until their lease ends."""

    def __init__(
        self,
        block_size: int,
        lease_s: float,
        may_go: Callable[[Request], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Start empty; the manager is set later (`manager`).

        Args:
            block_size: Tokens in a block.
            lease_s: How long blocks stay pinned, in seconds.
            may_go: Whether a request may move at all.
            clock: The time in seconds.
        """
        self.manager: KVCacheManager | None = None
        self._block_size = block_size
        self._lease_s = lease_s
        self._may_go = may_go
        self._clock = clock
        self._held: dict[str, tuple[list[KVCacheBlock], float]] = {}

    def __len__(self) -> int:
        """Requests whose full blocks are pinned now."""
        self.expire()
        return len(self._held)

    def pin(self, request: Request | None) -> list[int]:
        """
        Pin the full blocks of a request, if it decodes and may move.

        Returns:
            Their ids, from the first one on; empty if there are none. What was pinned for it before is given back.
        """
        n_blocks = 0 if request is None or not self._may_go(request) else self._n_full_blocks(request)
        if request is None or n_blocks == 0:
            return []
        blocks = list(self._manager().get_blocks(request.request_id).blocks[0][:n_blocks])
        self._manager().block_pool.touch(blocks)
        self.release(request.request_id)
        self._held[request.request_id] = blocks, self._clock() + self._lease_s
        return [block.block_id for block in blocks]

    def _n_full_blocks(self, request: Request) -> int:
        """Blocks that are full and computed; 0 unless the request decodes."""
        if request.status != RequestStatus.RUNNING or request.num_stale_output_tokens:
            return 0
        if request.num_output_tokens == 0 or request.is_prefill_chunk:
            return 0
        # What steps under way compute counts as computed already; it follows the last token that is known.
        return int(min(request.num_tokens - 1, request.num_computed_tokens) // self._block_size)

    def release(self, request_id: str) -> bool:
        """Give a request's blocks back; False when there are none."""
        held = self._held.pop(request_id, None)
        if held is None:
            return False
        self._manager().block_pool.free_blocks(reversed(held[0]))  # the end of a prefix is the first to be evicted
        return True

    def expire(self) -> None:
        """Give back what has been pinned for the length of a lease."""
        now_s = self._clock()
        for request_id in [r for r, (_, expires_s) in self._held.items() if expires_s <= now_s]:
            self.release(request_id)

    def n_blocks(self) -> int:
        """Blocks that nobody else holds."""
        self.expire()
        return sum(block.ref_cnt == 1 for blocks, _ in self._held.values() for block in blocks)

    def _manager(self) -> KVCacheManager:
        assert self.manager is not None, "the scheduler has not bound its KV cache manager"
        return self.manager


@dataclass(slots=True)
class _Precopy:
    """
    What is read ahead of one request.

    Attributes:
        engine_id: The source.
        remote_block_ids: Its blocks, from the first one on.
        ranks: Outcomes of the ranks that have told theirs.
        done: Whether it succeeded; None while any rank may read.
        stranded: Whether its reservation is gone.
    """

    engine_id: str
    remote_block_ids: list[int]
    ranks: dict[int, bool] = field(default_factory=dict)
    done: bool | None = None
    stranded: bool = False


class Precopies:
    """At the target: what is read ahead into reserved blocks, by reservation."""

    def __init__(self, reservations: Reservations, block_size: int) -> None:
        """Start empty."""
        self._reservations = reservations
        reservations.on_gone = self._reservation_gone
        self._block_size = block_size
        self._begun: dict[str, _Precopy] = {}
        #: Tokens of requests that came to what had been read ahead of them.
        self.tokens = 0

    @property
    def stranded(self) -> bool:
        """Whether a read may be under way whose reservation is gone, so that nobody asks for its outcome."""
        return any(precopy.stranded for precopy in self._begun.values())

    def begin(self, reservation_id: str, ticket: TransferParams) -> list[int] | None:
        """
        The reserved blocks into which the workers should read what the ticket names; None if they cannot.

        There must be a prefix cache, since the request finds them through it.
        """
        try:
            check_ticket(ticket, self._block_size)
        except WordsError:
            return None
        remote_block_ids = list(ticket["remote_block_ids"][0])
        if ticket["remote_num_tokens"] != len(remote_block_ids) * self._block_size or reservation_id in self._begun:
            return None
        block_ids = self._reservations.begin_read(reservation_id, len(remote_block_ids))
        if block_ids is not None:
            self._begun[reservation_id] = _Precopy(ticket["remote_engine_id"], remote_block_ids)
        return block_ids

    def learn(self, told: Sequence[Mapping[str, bool]]) -> None:
        """Take in what each rank has seen to be over since it was last asked."""
        for rank, outcomes in enumerate(told):
            for reservation_id, succeeded in outcomes.items():
                self._begun[reservation_id].ranks[rank] = succeeded
        for reservation_id, precopy in list(self._begun.items()):
            if precopy.done is None and len(precopy.ranks) == len(told):
                precopy.done = all(precopy.ranks.values())
                if not self._reservations.end_read(reservation_id):
                    del self._begun[reservation_id]

    def outcome(self, reservation_id: str) -> bool | None:
        """Whether the read has succeeded; None while it is under way."""
        precopy = self._begun.get(reservation_id)
        return False if precopy is None else precopy.done

    def adopt(self, request: Request, reservation_id: str, ticket: TransferParams) -> None:
        """The request comes: what was read ahead of it enters the prefix cache, if it is this request's."""
        precopy = self._begun.get(reservation_id)
        if precopy is None or not precopy.done or ticket.get("remote_engine_id") != precopy.engine_id:
            return
        n_blocks = len(precopy.remote_block_ids)
        same = list(ticket["remote_block_ids"][0])[:n_blocks] == precopy.remote_block_ids
        if not same or n_blocks * self._block_size >= request.num_tokens:
            return
        self._reservations.cache(reservation_id, request, n_blocks)
        self.tokens += n_blocks * self._block_size

    def _reservation_gone(self, reservation_id: str) -> None:
        """What was read is of no use any more; what is being read is remembered until it is over."""
        precopy = self._begun.get(reservation_id)
        if precopy is None:
            return
        precopy.stranded = True
        if precopy.done is not None:
            del self._begun[reservation_id]
