"""Blocks that belong to no running or waiting request are reported by what holds them, whatever the cause."""

from pathlib import Path

import pytest
from scheduler_bed import BLOCK, SchedulerBed, greedy, make_bed
from test_connector_words import PROMPT, TICKET
from vllm.v1.request import RequestStatus

from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.connector import commands
from cascadeinfer.engines.vllm.connector.held_blocks import HELD_BY

NOTHING = dict.fromkeys(HELD_BY, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def bed(model: Path, request: pytest.FixtureRequest) -> SchedulerBed:
    """An empty scheduler."""
    return make_bed(model, asynchronous=request.param)


def held(bed: SchedulerBed) -> dict[str, int]:
    """Held blocks by reason; every block in use is either a live request's or reported here."""
    load = bed.load()
    scheduler = bed.scheduler
    live = sum(
        len(scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])
        for request in scheduler.requests.values()
        if not request.is_finished() and request.status != RequestStatus.WAITING_FOR_REMOTE_KVS
    )
    assert live + sum(load["held_blocks"].values()) == load["kv_blocks_used"]
    return {reason: n for reason, n in load["held_blocks"].items() if n}


def test_requests_that_run_hold_nothing_else(bed: SchedulerBed) -> None:
    """Blocks of live requests are in use, but not held."""
    assert bed.load()["held_blocks"] == NOTHING
    bed.add("a", PROMPT, greedy(30))
    bed.steps(4)
    assert held(bed) == {}
    assert bed.load()["kv_blocks_used"] == 3


def test_reservations(bed: SchedulerBed) -> None:
    """Reservations that have not been claimed are held."""
    assert commands.cascade_reserve(bed.core, "r1", 2 * BLOCK) is None
    assert commands.cascade_reserve(bed.core, "r2", BLOCK + 1) is None
    assert held(bed) == {"reservations": 3 + 3}
    commands.cascade_release_reservation(bed.core, "r1")
    assert held(bed) == {"reservations": 3}
    bed.pulls_come = False
    bed.add("a", PROMPT, bed.words(greedy(14), **TICKET, cascade_reservation="r2"))
    assert held(bed) == {}
    bed.step()
    assert held(bed) == {"pulls": 3}


def test_a_cut_pins(bed: SchedulerBed) -> None:
    """The blocks of a request that has left are held until they have been read."""
    bed.add("a", PROMPT, greedy(30))
    bed.steps(4)
    assert commands.cascade_cut(bed.core, "a") is None
    bed.steps(3)
    assert held(bed) == {"pins": 3}
    assert bed.load()["pinned"] == ["a"]
    bed.read.add("a")
    bed.steps(2)
    assert bed.holds_nothing()


def test_a_pin_that_is_none_of_ours(bed: SchedulerBed) -> None:
    """A pin shows whatever caused it: here NIXL pins a request at its normal end, without a cut of ours."""
    request = bed.add("a", PROMPT, greedy(4))
    request.kv_transfer_params = {"do_remote_decode": True}
    bed.steps(7)
    assert "a" in bed.ends
    assert bed.load()["pinned"] == []
    assert held(bed) == {"unfreed": 3}


def test_a_pull_that_nobody_waits_for_any_more(bed: SchedulerBed) -> None:
    """The client has left during the pull: the blocks are held until it completes, because it still writes to them."""
    bed.pulls_come = False
    bed.add("a", PROMPT, bed.words(greedy(14), **TICKET))
    bed.steps(2)
    assert held(bed) == {"pulls": 3}
    bed.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    bed.steps(2)
    assert held(bed) == {"unfreed": 3}
    bed.pulls_come = True
    bed.steps(2)
    assert bed.holds_nothing()


def test_blocks_that_a_step_may_still_write(model: Path) -> None:
    """Blocks of a request that was aborted during a step are held until that step has ended."""
    bed = make_bed(model, asynchronous=True)
    bed.add("a", PROMPT, greedy(30))
    bed.steps(3)
    bed.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert held(bed) == {"deferred": 3}
    bed.steps(2)
    assert bed.holds_nothing()


def test_a_reservation_leaves_what_a_prefill_needs(bed: SchedulerBed) -> None:
    """
    Blocks that an unfinished prefill will need are not reserved: vLLM would let the pull wait for them.

    Two prompts share one step's budget; the second still needs most of its blocks.
    """
    bed.add("first", list(range(3, 403)), greedy(30))
    bed.add("second", list(range(403, 3, -1)), greedy(30))
    bed.step()
    free = bed.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    to_come = bed.scheduler._inflight_prefill_reserved_blocks()
    assert 0 < to_come < free
    assert commands.cascade_reserve(bed.core, "too large", (free - to_come) * BLOCK) == "no_blocks"
    assert commands.cascade_reserve(bed.core, "fits", (free - to_come - 1) * BLOCK) is None


def test_an_undone_cut_leaves_nothing_with_the_worker(bed: SchedulerBed) -> None:
    """The worker learns of a cut with the next step; if the cut is undone, it learns of both or of neither."""
    bed.add("a", PROMPT, greedy(60))
    bed.steps(4)
    side = bed.side
    assert commands.cascade_cut(bed.core, "a") is None
    assert commands.cascade_undo_cut(bed.core, "a")
    assert "a" not in side._reqs_in_batch | side._reqs_not_processed
    request = bed.scheduler.requests["a"]
    assert side.cut(request) is None
    side._reqs_in_batch.clear()  # as a step's metadata does
    assert side.undo_cut(request)
    assert side._reqs_not_processed == {"a"}
    assert side.cut(request) is None
    assert ("a" in side._reqs_in_batch, side._reqs_not_processed) == (True, set())
