"""
A fault in any of the connector's hooks ends its request but not the engine, and leaves nothing behind.

Runs against vLLM's own scheduler.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scheduler_bed import SchedulerBed, greedy, make_bed
from test_connector_words import PROMPT, TICKET
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus

from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.connector import commands, scheduler_side
from cascadeinfer.engines.vllm.connector.scheduler_side import CascadeSchedulerSide
from cascadeinfer.engines.vllm.connector.v1_runner import V1Terms


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Make this hook raise for the request "bad" after it has done its work; returns the list of its calls."""
    original = getattr(owner, name)
    calls: list[str] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        ids = [a.request_id if isinstance(a, Request) else a for a in (*args, *kwargs.values())]
        if "bad" in [i for i in ids if isinstance(i, str)]:
            calls.append(name)
            raise RuntimeError("injected")
        return result

    monkeypatch.setattr(owner, name, failing)
    return calls


def fresh(bed: SchedulerBed) -> None:
    """A client's request."""
    bed.add("bad", PROMPT, greedy(14))


def fresh_without_cache(bed: SchedulerBed) -> None:
    """A request for which the scheduler does not consult the connector."""
    bed.add("bad", PROMPT, greedy(14, prompt_logprobs=1))


def pulling(bed: SchedulerBed) -> None:
    """A request whose KV cache is to be pulled."""
    bed.add("bad", PROMPT, bed.words(greedy(14), **TICKET))


def recomputing(bed: SchedulerBed) -> None:
    """A request resumed without its KV cache."""
    bed.add("bad", PROMPT, bed.words(greedy(14, min_tokens=12), cascade_prompt_tokens=30))


HOOKS: list[tuple[Any, str, Callable[[SchedulerBed], None]]] = [
    (NixlPullConnectorScheduler, "on_new_request", fresh),
    (NixlPullConnectorScheduler, "on_new_request", fresh_without_cache),
    (NixlPullConnectorScheduler, "on_new_request", pulling),
    (CascadeSchedulerSide, "_split", pulling),
    (CascadeSchedulerSide, "_split", recomputing),
    (V1Terms, "came", recomputing),
    (scheduler_side, "check_words", pulling),
    (NixlPullConnectorScheduler, "get_num_new_matched_tokens", fresh),
    (NixlPullConnectorScheduler, "get_num_new_matched_tokens", fresh_without_cache),
    (CascadeSchedulerSide, "_matched_tokens", pulling),
    (CascadeSchedulerSide, "_matched_tokens", recomputing),
    (NixlPullConnectorScheduler, "update_state_after_alloc", fresh),
    (NixlPullConnectorScheduler, "update_state_after_alloc", fresh_without_cache),
    (NixlPullConnectorScheduler, "update_state_after_alloc", pulling),
    (NixlPullConnectorScheduler, "update_state_after_alloc", recomputing),
    (NixlConnectorMetadata, "add_new_req_to_recv", pulling),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "kind"), HOOKS, ids=[f"{owner.__name__.split('.')[-1]}.{n}-{k.__name__}" for owner, n, k in HOOKS]
)
def test_a_hook_that_fails_ends_its_request(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    kind: Callable[[SchedulerBed], None],
    asynchronous: bool,
) -> None:
    """The request ends with an error, its neighbours get their tokens, and what it held is freed."""
    bed = make_bed(model, asynchronous=asynchronous)
    calls = fail_at(monkeypatch, owner, name)
    bed.add("before", PROMPT[:20], greedy(6))
    bed.step()
    kind(bed)
    bed.add("after", PROMPT[:25], greedy(4))
    bed.steps(10)
    assert calls
    assert bed.failed("bad")
    assert (bed.tokens["before"], bed.tokens["after"]) == ([7] * 6, [7] * 4)
    assert not bed.side._failures._ending
    assert bed.holds_nothing()
    assert not bed.pulled, "the worker pulls for a request that has ended"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_pull_leaves_no_strange_blocks_in_the_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Blocks that were never filled are not cached as a prefix: a request with the same tokens computes them itself."""
    bed = make_bed(model, asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        fail_at(patch, NixlPullConnectorScheduler, "update_state_after_alloc")
        pulling(bed)
        bed.steps(5)
    assert bed.failed("bad")
    bed.add("same", PROMPT, greedy(2))
    output = bed.scheduler.schedule()
    assert output.num_scheduled_tokens == {"same": len(PROMPT)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fault_at_the_end(model: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """A request that ends while a hook fails has ended normally, with all its tokens."""
    bed = make_bed(model, asynchronous=asynchronous)
    calls = fail_at(monkeypatch, CascadeSchedulerSide, "_finished")
    bed.add("bad", PROMPT, greedy(4))
    bed.steps(7)
    assert calls
    assert (bed.tokens["bad"], bed.ends["bad"].finish_reason) == ([7] * 4, FinishReason.LENGTH)
    assert bed.holds_nothing()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fault_at_a_cut(model: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """
    If a cut request's blocks cannot be pinned, the cut is reported without a KV cache, so that the request can continue
    elsewhere. Its blocks are freed.
    """
    bed = make_bed(model, asynchronous=asynchronous)
    calls = fail_at(monkeypatch, CascadeSchedulerSide, "_finished")
    bed.add("bad", PROMPT, greedy(40))
    bed.steps(4)
    assert commands.cascade_cut(bed.core, "bad") is None
    bed.steps(4)
    assert calls
    assert bed.ends["bad"].kv_transfer_params == {"cascade_cut": True, "remote_num_tokens": 0}
    assert len(bed.tokens["bad"]) < 40
    assert bed.holds_nothing()


def test_a_failed_request_is_not_cut(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its fault and its end, a request refuses a cut, and there is no cut to undo."""
    bed = make_bed(model)
    fail_at(monkeypatch, NixlPullConnectorScheduler, "on_new_request")
    fresh(bed)
    assert commands.cascade_cut(bed.core, "bad") == "ending"
    assert commands.cascade_undo_cut(bed.core, "bad") is False
    bed.scheduler.finish_requests("bad", RequestStatus.FINISHED_ABORTED)
    bed.steps(2)
    assert "bad" not in bed.ends, "the client has left"
    assert bed.holds_nothing()
    assert not bed.side._failures._ending
