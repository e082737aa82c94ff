"""Requests that vLLM hands over and we refuse: what remains in vLLM's books and in ours."""

import asyncio
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cascadeinfer.core.errors import ConfigError, PolicyError, RequestIdInUseError, RequestRejectedError
from cascadeinfer.engines.protocol import EngineRequest
from cascadeinfer.frontend.engine_client import CascadeEngineClient, CascadeLLM
from cascadeinfer.frontend.pins import Pins
from cascadeinfer.frontend.server_options import check_environment


class Desk:
    """One of our clients, with a runtime that only raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        """
        Args:
            error: Raised at each request.
        """
        self.submitted: list[str] = []
        self.forgotten: list[str] = []
        self.client = CascadeEngineClient.__new__(CascadeEngineClient)
        self.client._runtime = SimpleNamespace(submit=self._submit)  # type: ignore[assignment]
        config = VllmConfig()
        config.model_config = SimpleNamespace(logits_processors=None)  # type: ignore[assignment]
        self.client._pins = Pins(config, movable=True, model_runner="V1")
        self.client._vllm_config = config
        self.client.forget = self.forgotten.append
        self._error = error

    async def _submit(self, request: EngineRequest) -> None:
        self.submitted.append(request.request_id)
        if self._error is not None:
            raise self._error

    def hand_over(self, **different: object) -> None:
        """Hand over a request as vLLM does."""
        fields = {
            "request_id": "r",
            "prompt_token_ids": [1, 2, 3],
            "mm_features": None,
            "sampling_params": SamplingParams(max_tokens=8),
            "pooling_params": None,
            "arrival_time": 0.0,
            "lora_request": None,
            "cache_salt": None,
            "data_parallel_rank": None,
        }
        asyncio.run(self.client.add_request_async(EngineCoreRequest(**{**fields, **different})))


def test_what_comes_to_be_aborted_is_not_taken() -> None:
    """What vLLM sends for its connector is no request: there is nothing to compute, to refuse or to forget."""
    desk = Desk()
    desk.hand_over(abort_immediately=True)
    assert (desk.submitted, desk.forgotten) == ([], [])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestRejectedError("queue_full", 1.0), HTTPStatus.TOO_MANY_REQUESTS),
        (PolicyError("failed"), HTTPStatus.INTERNAL_SERVER_ERROR),
        (OSError("disk full"), None),
        (asyncio.CancelledError(), None),
    ],
    ids=["refused", "the policy failed", "a fault of ours", "the client left"],
)
def test_what_fails_is_forgotten(error: BaseException, status: HTTPStatus | None) -> None:
    """Whatever is raised, vLLM keeps no request that nobody serves."""
    desk = Desk(error)
    with pytest.raises(type(error) if status is None else GracefulHTTPError) as raised:
        desk.hand_over()
    assert getattr(raised.value, "http_status", None) == status
    assert desk.forgotten == ["r"]


@pytest.mark.parametrize("fault", [{"resumable": True}, {"priority": 10**7}], ids=["streaming input", "priority"])
def test_what_is_refused_unseen_is_forgotten(fault: dict[str, object]) -> None:
    """The client gets HTTP 400 before the runtime sees the request."""
    desk = Desk()
    with pytest.raises(GracefulHTTPError) as raised:
        desk.hand_over(**fault)
    assert raised.value.http_status == HTTPStatus.BAD_REQUEST
    assert (desk.submitted, desk.forgotten) == ([], ["r"])


def test_an_id_in_use_forgets_nobody() -> None:
    """The newcomer gets HTTP 409; under that id, the books keep the older request, which continues."""
    desk = Desk(RequestIdInUseError("r"))
    with pytest.raises(GracefulHTTPError) as raised:
        desk.hand_over()
    assert raised.value.http_status == HTTPStatus.CONFLICT
    assert desk.forgotten == []


def test_ids_that_clients_choose_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with one front-end process: by choosing another client's id, a client could end its stream."""
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    with pytest.raises(ConfigError, match=r"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION.*unset it"):
        check_environment(1)
    monkeypatch.delenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION")
    check_environment(1)


@pytest.mark.parametrize(
    ("request_id", "params"),
    [
        ("r", SamplingParams(stop_token_ids=[2**70])),
        ("r", SamplingParams(top_k=2**70)),
        ("r", SamplingParams(logprobs=2**70)),
        ("r", SamplingParams(stop=["\ud800"])),
        ("r", SamplingParams(extra_args={"x": "\ud800"})),
        ("r\ud800", SamplingParams()),
        ("r", PoolingParams(dimensions=2**70)),
    ],
    ids=["stop tokens", "top_k", "logprobs", "stop string", "extra", "request id", "pooling"],
)
def test_what_fits_into_no_message_is_refused(request_id: str, params: SamplingParams | PoolingParams) -> None:
    """HTTP 400 before the request is recorded anywhere; an engine would fail on it, in a task that nobody awaits."""
    llm = CascadeLLM.__new__(CascadeLLM)
    with pytest.raises(GracefulHTTPError, match=r"cannot be sent to an engine|request_id must be") as raised:
        asyncio.run(llm.add_request(request_id, "prompt", params))
    assert raised.value.http_status == HTTPStatus.BAD_REQUEST
