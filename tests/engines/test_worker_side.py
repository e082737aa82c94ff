"""The connector's worker side: failed pulls, leases that are renewed, and reads that are none of the scheduler's."""

import queue
import time
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from cascadeinfer.engines.vllm.connector.deadline import PullDeadlines
from cascadeinfer.engines.vllm.connector.worker_side import CascadeWorkerSide


@pytest.mark.parametrize("fault", [NotImplementedError, AssertionError, KeyError, IndexError])
def test_a_pull_that_cannot_begin(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]) -> None:
    """The pull is reported as failed, so that the scheduler recomputes its tokens; the next pull begins."""
    begun: list[str] = []

    def read_blocks(_: Any, request_id: str, meta: Any) -> None:  # noqa: ARG001 - NIXL's signature
        if request_id == "bad":
            raise fault
        begun.append(request_id)

    monkeypatch.setattr(NixlPullConnectorWorker, "_read_blocks_for_req", read_blocks)
    side: Any = object.__new__(CascadeWorkerSide)
    side._recv_failures = set()
    side.deadlines = PullDeadlines()
    for request_id in ("bad", "good"):
        side._read_blocks_for_req(request_id, SimpleNamespace(awaiting_kvs=True))
    assert side._recv_failures == {"bad"}
    assert begun == ["good"]


def test_a_lease_is_renewed_while_it_lasts() -> None:
    """It ends later, never earlier; one that is over, or unknown, stays so."""
    side: Any = object.__new__(CascadeWorkerSide)
    now_s = time.perf_counter()
    side._reqs_to_send = {"lasts": now_s + 100.0, "long": now_s + 1e6, "over": now_s - 1.0}
    assert [side.renew(name, 1000.0) for name in ("lasts", "long", "over", "unknown")] == [True, True, False, False]
    assert side._reqs_to_send["lasts"] >= now_s + 1000.0
    assert side._reqs_to_send["long"] == now_s + 1e6
    assert side._reqs_to_send["over"] == now_s - 1.0


def test_the_scheduler_hears_nothing_of_precopies(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Reads that go ahead of their requests are told to who asks for them, their blocks are not reported as invalid, and
    what else is complete waits for the next step.
    """
    side: Any = object.__new__(CascadeWorkerSide)
    side.deadlines = PullDeadlines()
    side._released, side._results = {"pin"}, KVConnectorTransferResults()
    side._ready_requests, side._invalid_block_ids = queue.Queue(), queue.Queue()
    side._precopying, side._precopied = {"well": frozenset({1}), "ill": frozenset({2, 3}), "on": frozenset({4})}, {}
    side.deadlines.expect("ill", 5.0)
    coming = [
        KVConnectorTransferResults({"read"}, {"well", "ill", "pull", "bad"}, {"ill", "bad"}),
        KVConnectorTransferResults({"sent"}, {"later"}, set()),
    ]
    side._invalid_block_ids.put({2, 3})
    side._invalid_block_ids.put({9})
    monkeypatch.setattr(NixlPullConnectorWorker, "get_transfer_results", lambda _: coming.pop(0))
    assert side.precopied() == {"well": True, "ill": False}
    assert (len(side.deadlines), list(side._precopying)) == (0, ["on"])
    assert side.get_block_ids_with_load_errors() == {9}
    results = side.get_transfer_results()
    assert results.finished_sending == {"read", "sent", "pin"}
    assert results.finished_recving == {"pull", "bad", "later"}
    assert results.failed_recving == {"bad"}
    monkeypatch.setattr(NixlPullConnectorWorker, "get_transfer_results", lambda _: KVConnectorTransferResults())
    assert side.precopied() == {}
    assert side.get_transfer_results() == KVConnectorTransferResults()


def test_a_precopy_that_cannot_begin_has_failed() -> None:
    """Whoever asks for its outcome learns that, and its room can be given back."""
    side: Any = object.__new__(CascadeWorkerSide)
    side._precopying, side._precopied = {}, {}
    side.precopy("room", {"remote_block_ids": ([1],)}, [7], None)
    assert (side._precopying, side._precopied) == ({}, {"room": False})
