"""Refused requests in vLLM's own books: the client gets HTTP 429, and nothing of the request remains there."""

from http import HTTPStatus
from types import SimpleNamespace

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from cascadeinfer.core.errors import RequestRejectedError
from cascadeinfer.frontend.engine_client import CascadeLLM, OverloadedError
from cascadeinfer.runtime.isolation import POISON_SENTENCE

REFUSAL = RequestRejectedError("queue_full", 2.5)


class Books:
    """A `CascadeLLM` with vLLM's output processor and nothing behind it."""

    def __init__(self) -> None:
        """Start without requests."""
        self.aborted: list[str] = []
        self.processor = OutputProcessor(None, log_stats=False)
        self.llm = CascadeLLM.__new__(CascadeLLM)
        self.llm.output_processor = self.processor
        self.llm.runtime = SimpleNamespace(abort=self.aborted.extend)  # type: ignore[assignment]

    def note(self, request: EngineCoreRequest, parent: ParentRequest | None = None) -> RequestOutputCollector:
        """Record a request as `AsyncLLM` does before it hands it over."""
        queue = RequestOutputCollector(RequestOutputKind.DELTA, request.request_id)
        self.processor.add_request(request, None, parent, 0, queue)
        return queue

    def empty(self) -> bool:
        """Whether nothing is recorded."""
        books = self.processor
        return not (books.request_states or books.parent_requests or any(books.external_req_ids.values()))


def request_of(request_id: str, n: int = 1) -> EngineCoreRequest:
    """A request as vLLM's input processor makes it."""
    return EngineCoreRequest(
        request_id=request_id,
        external_req_id=f"external-{request_id}",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(n=n, max_tokens=8),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_a_late_refusal_reaches_whoever_waits_for_tokens() -> None:
    """The client's queue raises HTTP 429 with the time to retry after, not vLLM's word for an abort."""
    books = Books()
    queue = books.note(request_of("r"))
    books.llm.refuse_late("r", REFUSAL)
    with pytest.raises(OverloadedError) as raised:
        queue.get_nowait()
    assert raised.value.retry_after_s == 2.5
    assert queue.get_nowait() is None
    assert books.empty()


def test_a_refusal_at_once_leaves_nothing_in_the_books() -> None:
    """A request that vLLM recorded before it handed it over is dropped when refused; others stay."""
    books = Books()
    books.note(request_of("refused"))
    books.note(request_of("other"))
    books.llm.forget_request("refused")
    assert list(books.processor.request_states) == ["other"]
    books.llm.forget_request("other")
    assert books.empty()


def test_siblings_of_a_refused_request_stop() -> None:
    """With `n` > 1, the client gets one refusal for all; the siblings are aborted rather than computed for nobody."""
    books = Books()
    parent = ParentRequest(request_of("p", n=3))
    queues = []
    for index in range(3):
        child_id, sampling_params = parent.get_child_info(index)
        child = request_of(child_id)
        child.external_req_id = "external-p"
        child.sampling_params = sampling_params
        queues.append(books.note(child, parent))
    first = next(iter(books.processor.request_states))
    siblings = set(books.processor.request_states) - {first}
    books.llm.refuse_late(first, REFUSAL)
    with pytest.raises(OverloadedError):
        queues[0].get_nowait()
    assert siblings <= set(books.aborted)
    assert books.empty()


def test_poison_reaches_whoever_waits_for_tokens() -> None:
    """The client's queue raises HTTP 500 with the reason; the request's siblings are aborted."""
    books = Books()
    parent = ParentRequest(request_of("parent", n=2))
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "parent")
    for index, name in enumerate(("0_parent", "1_parent")):
        child_id, _ = parent.get_child_info(index)
        assert child_id == name
        books.processor.add_request(request_of(child_id, n=2), None, parent, index, queue)
    books.llm.fail("0_parent", POISON_SENTENCE)
    with pytest.raises(GracefulHTTPError, match="poison_request") as raised:
        queue.get_nowait()
    assert raised.value.http_status == HTTPStatus.INTERNAL_SERVER_ERROR
    assert "1_parent" in books.aborted
    assert books.empty()


def test_a_refusal_of_somebody_unknown_is_nothing() -> None:
    """A refusal that crosses the client's disconnection does no harm."""
    books = Books()
    books.llm.refuse_late("gone", REFUSAL)
    assert books.empty()
    assert not books.aborted
