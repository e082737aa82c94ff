"""
A pull past its deadline is not started, and one that completes too late is not used.

Runs against vLLM's own scheduler and worker.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_bed import SchedulerBed, greedy, make_bed
from test_connector_words import PROMPT, TICKET
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.connector.deadline import PullDeadlines, attach_deadlines, is_over
from cascadeinfer.engines.vllm.connector.ticket import CUT, PULL_BEFORE, VllmTicket, resume_params
from cascadeinfer.engines.vllm.connector.worker_side import CascadeWorkerSide


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def bed(model: Path, request: pytest.FixtureRequest) -> SchedulerBed:
    """An empty scheduler."""
    return make_bed(model, asynchronous=request.param)


def _add(bed: SchedulerBed, request_id: str, pull_before_s: float) -> None:
    bed.add(request_id, PROMPT, bed.words(greedy(14), **TICKET, **{PULL_BEFORE: pull_before_s}))


def test_a_resume_whose_time_is_over(bed: SchedulerBed) -> None:
    """The request is recomputed and gets its tokens; the worker only tells the source that no blocks are needed."""
    _add(bed, "late", time.monotonic() - 0.001)
    bed.steps(8)
    assert bed.tokens["late"] == [7] * 4
    assert [pull.awaiting_kvs for pull in bed.pulled] == [False]
    assert (bed.load()["pulls"], bed.load()["failed_pulls"]) == (0, 0)
    assert bed.holds_nothing()


def test_the_worker_is_told(bed: SchedulerBed) -> None:
    """The step's metadata for the worker has the deadline of every pull that begins with it, and no others."""
    before_s = time.monotonic() + 3600
    _add(bed, "soon", before_s)
    bed.add("whenever", PROMPT, bed.words(greedy(14), **TICKET))
    metadata = bed.scheduler.schedule().kv_connector_metadata
    assert metadata.reqs_to_recv.keys() == {"soon", "whenever"}
    deadlines = PullDeadlines(lambda: before_s)
    deadlines.learn(metadata)
    assert deadlines.late(["soon", "whenever"]) == {"soon"}
    assert len(deadlines) == 1


def test_a_pull_that_has_failed_leaves_nothing_in_the_prefix_cache(bed: SchedulerBed) -> None:
    """
    Blocks that were read too late never become a prefix of other requests.

    The request is recomputed instead.
    """
    bed.pulls_come = False
    _add(bed, "late", time.monotonic() + 3600)
    bed.steps(2)
    assert not bed.tokens
    cached = bed.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    assert not len(cached)
    bed.pulls_come = bed.pulls_fail = True
    before = bed.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    bed.step()
    assert not len(cached), "known as a prefix before it was computed"
    bed.steps(9)
    assert bed.tokens["late"] == [7] * 4
    assert bed.load()["failed_pulls"] == 1
    assert before < bed.load()["kv_blocks"]
    assert bed.holds_nothing()


def _worker(now_s: float, deadlines: dict[str, float]) -> Any:
    side: Any = object.__new__(CascadeWorkerSide)
    side._recv_failures = set()
    side._released = set()
    side._precopying, side._precopied, side._results = {}, {}, KVConnectorTransferResults()
    side.deadlines = PullDeadlines(lambda: now_s)
    metadata = NixlConnectorMetadata()
    attach_deadlines(metadata, [(r, {PULL_BEFORE: before_s}) for r, before_s in deadlines.items()])
    side.deadlines.learn(metadata)
    return side


def test_a_read_that_is_complete_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two completed reads, the late one has failed; a read without a deadline has not."""
    side = _worker(10.0, {"late": 10.0, "in time": 10.1})
    done = {"late", "in time", "whenever"}
    monkeypatch.setattr(NixlPullConnectorWorker, "_pop_done_transfers", lambda *_: (set(done), {"broken"}))
    assert side._pop_done_transfers({}) == (done, {"late", "broken"})


def test_nothing_is_kept_of_pulls_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of those that succeeded nor of those that failed."""
    side = _worker(10.0, {"late": 9.0, "in time": 11.0, "under way": 12.0})
    results = KVConnectorTransferResults(finished_recving={"late", "in time"}, failed_recving={"late"})
    monkeypatch.setattr(NixlPullConnectorWorker, "get_transfer_results", lambda _: results)
    side.get_transfer_results()
    assert len(side.deadlines) == 1


def test_a_read_whose_time_is_over_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The read fails; a mere notice to the source that its blocks are not needed goes out at any time."""
    begun: list[str] = []
    monkeypatch.setattr(
        NixlPullConnectorWorker, "_read_blocks_for_req", lambda _, request_id, _meta: begun.append(request_id)
    )
    side = _worker(10.0, {"late": 9.0, "in time": 11.0, "word": 9.0})
    for request_id in ("late", "in time", "word"):
        side._read_blocks_for_req(request_id, SimpleNamespace(awaiting_kvs=request_id != "word"))
    assert side._recv_failures == {"late"}
    assert begun == ["in time", "word"]


def test_the_word_goes_with_a_ticket_only() -> None:
    """A request that is computed anyway has no deadline; a deadline that is minus infinity has passed."""
    ticket = VllmTicket({CUT: True, "remote_num_tokens": 39})
    assert resume_params(ticket, prompt_tokens=30, pull_before_s=5.0)[PULL_BEFORE] == 5.0
    assert PULL_BEFORE not in resume_params(None, prompt_tokens=30, pull_before_s=5.0)
    assert PULL_BEFORE not in resume_params(ticket, prompt_tokens=30)
    assert is_over({PULL_BEFORE: float("-inf")})
    assert not is_over({})
