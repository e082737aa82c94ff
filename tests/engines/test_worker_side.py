"""The connector's worker side: a pull that cannot begin counts as failed; leases are renewed while they last."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
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
