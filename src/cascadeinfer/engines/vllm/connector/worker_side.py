"""
The connector's half in a worker: handshakes in advance, release of pinned blocks on command, deadlines of pulls,
pre-copy.

`handshake`, `release`, `renew`, `precopy` and `precopied` are called through the executor's collective RPC (see
`commands.py`), between two steps, on every rank.
"""

import logging
import time
from typing import Any, Final

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from cascadeinfer.engines.vllm.connector.cores import kept_on_its_cores, sleeping_progress_thread
from cascadeinfer.engines.vllm.connector.deadline import PullDeadlines
from cascadeinfer.engines.vllm.connector.ticket import TransferParams

logger = logging.getLogger(__name__)

NOBODY: Final = "HB:"
"""
In place of the request that a completed read releases at the source. A pre-copy releases none; a notification with this
beginning is a heartbeat there, and this one names no request.
"""


class CascadeWorkerSide(NixlPullConnectorWorker):
    """NIXL's pull worker, with release on command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See NixlPullConnectorWorker."""
        with sleeping_progress_thread(), kept_on_its_cores():
            super().__init__(*args, **kwargs)
        self._released: set[str] = set()
        #: To be released as soon as the scheduler's half has announced the pin (with the next step).
        self._release_on_arrival: set[str] = set()
        self.deadlines = PullDeadlines()
        #: Pre-copies under way and the blocks they are read into; those over, and whether they succeeded.
        self._precopying: dict[str, frozenset[int]] = {}
        self._precopied: dict[str, bool] = {}
        #: Completions for the scheduler's half that came outside of a step.
        self._results = KVConnectorTransferResults()

    def release(self, request_id: str) -> None:
        """Release the blocks pinned for this request before its lease ends; the caller knows that they are pinned."""
        if request_id not in self._reqs_to_send:
            self._release_on_arrival.add(request_id)
            return
        self.consumer_notification_counts_by_req.pop(request_id, None)
        self.expected_consumer_notifications_by_req.pop(request_id, None)
        self._reqs_to_process.discard(request_id)
        del self._reqs_to_send[request_id]
        self._released.add(request_id)

    def renew(self, request_id: str, lease_s: float) -> bool:
        """Begin the lease on this request's blocks anew; False if they are not pinned here any more."""
        expires_s, now_s = self._reqs_to_send.get(request_id), time.perf_counter()
        if expires_s is None or now_s >= expires_s:
            return False
        self._reqs_to_send[request_id] = max(expires_s, now_s + lease_s)
        return True

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        """NIXL's step, then the releases that came before their pins."""
        self.deadlines.learn(metadata)
        super().start_load_kv(metadata)
        for request_id in self._release_on_arrival & self._reqs_to_send.keys():
            self._release_on_arrival.discard(request_id)
            self.release(request_id)

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        """NIXL's pull of one request. If it cannot begin, or begins too late, it fails alone; the others begin."""
        if meta.awaiting_kvs and self.deadlines.have_passed(req_id):
            logger.warning("request %s: its pull does not begin: the time for it is over", req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)
            return
        try:
            super()._read_blocks_for_req(req_id, meta)
        except Exception:
            logger.exception("request %s: its pull cannot begin", req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """NIXL's poll of the pulls; one that completed after its blocks were guaranteed to be pinned has failed."""
        done, failed = super()._pop_done_transfers(transfers)
        late = self.deadlines.late(done)  # the clock is read after the reads were seen to be complete
        for request_id in late:
            logger.warning("request %s: its pull was over too late and is not used", request_id)
        return done, failed | late

    def get_transfer_results(self) -> KVConnectorTransferResults:
        """NIXL's results plus what was released on command; the scheduler frees those blocks as if they were read."""
        self._collect()
        results, self._results = self._results, KVConnectorTransferResults()
        results.finished_sending.update(self._released)
        self._released.clear()
        return results

    def _collect(self) -> None:
        """Keep what NIXL has completed since the last time; pre-copies are none of the scheduler's requests."""
        new, kept = super().get_transfer_results(), self._results
        self.deadlines.forget(new.finished_recving)
        failed_blocks: set[int] = set()
        for precopy_id in new.finished_recving & self._precopying.keys():
            succeeded = precopy_id not in new.failed_recving
            block_ids = self._precopying.pop(precopy_id)
            self._precopied[precopy_id] = succeeded
            failed_blocks |= frozenset() if succeeded else block_ids
            new.finished_recving.discard(precopy_id)
            new.failed_recving.discard(precopy_id)
        if failed_blocks and (invalid := self.get_block_ids_with_load_errors() - failed_blocks):
            self._invalid_block_ids.put(invalid)
        kept.finished_sending |= new.finished_sending
        kept.finished_recving |= new.finished_recving
        kept.failed_recving |= new.failed_recving

    def precopy(self, precopy_id: str, ticket: TransferParams, block_ids: list[int], before_s: float | None) -> None:
        """
        Begin to read a peer's blocks while their request decodes there. One that cannot begin has failed.

        Args:
            precopy_id: No request's id.
            ticket: Which blocks; see `precopy_ticket`.
            block_ids: As many blocks here.
            before_s: Deadline, as that of a pull.
        """
        made = NixlConnectorMetadata()
        params = {**ticket, "remote_request_id": NOBODY}
        try:
            made.add_new_req_to_recv(precopy_id, (block_ids,), params, (0,), awaiting_kvs=True)
            meta = made.reqs_to_recv[precopy_id]
            meta.local_physical_block_ids = self._logical_to_kernel_block_ids(
                meta.local_block_ids, self._physical_blocks_per_logical_kv_block
            )
        except Exception:
            logger.exception("%s: nothing can be copied ahead", precopy_id)
            self._precopied[precopy_id] = False
            return
        self._precopying[precopy_id] = frozenset(block_ids)
        self.deadlines.expect(precopy_id, before_s)
        self._recving_metadata[precopy_id] = meta
        self._read_blocks_for_req(precopy_id, meta)

    def precopied(self) -> dict[str, bool]:
        """Pre-copies that are over since the last question, and whether they succeeded; an idle engine has no steps."""
        while not self._ready_requests.empty():  # as `start_load_kv` does
            self._read_blocks_for_req(*self._ready_requests.get_nowait())
        self._collect()
        over, self._precopied = self._precopied, {}
        return over

    def handshake(self, engine_id: str, host: str, port: int, tp_size: int) -> bool:
        """Start the handshake with a peer in the background; True once it is done."""
        return self._ensure_handshake(engine_id, host, port, tp_size) is None


def _this_worker() -> CascadeWorkerSide:
    connector = get_kv_transfer_group()
    side = connector.connector_worker
    assert isinstance(side, CascadeWorkerSide)
    return side


def handshake_on_worker(_worker: Any, engine_id: str, host: str, port: int, tp_size: int) -> bool:
    """Collective-RPC form of `CascadeWorkerSide.handshake`."""
    return _this_worker().handshake(engine_id, host, port, tp_size)


def release_on_worker(_worker: Any, request_id: str) -> None:
    """Collective-RPC form of `CascadeWorkerSide.release`."""
    _this_worker().release(request_id)


def renew_on_worker(_worker: Any, request_id: str, lease_s: float) -> bool:
    """Collective-RPC form of `CascadeWorkerSide.renew`."""
    return _this_worker().renew(request_id, lease_s)


def precopy_on_worker(
    _worker: Any, precopy_id: str, ticket: TransferParams, block_ids: list[int], before_s: float | None
) -> None:
    """Collective-RPC form of `CascadeWorkerSide.precopy`."""
    _this_worker().precopy(precopy_id, ticket, block_ids, before_s)


def precopied_on_worker(_worker: Any) -> dict[str, bool]:
    """Collective-RPC form of `CascadeWorkerSide.precopied`."""
    return _this_worker().precopied()
