"""What vLLM hands over and we do not take: what stays in vLLM's books and in ours."""

import asyncio
from argparse import Namespace
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
from cascadeinfer.frontend.server import check_api_servers


class Desk:
    """A client of ours before a runtime that does nothing but raise."""

    def __init__(self, error: BaseException | None = None) -> None:
        """
        Args:
            error: Raised at each request.
        """
        self.submitted: list[str] = []
        self.forgotten: list[str] = []
        self.client = CascadeEngineClient.__new__(CascadeEngineClient)
        self.client._runtime = SimpleNamespace(submit=self._submit)  # type: ignore[assignment]
        self.client._movable = True
        self.client._vllm_config = VllmConfig()
        self.client.forget = self.forgotten.append
        self._error = error

    async def _submit(self, request: EngineRequest) -> None:
        self.submitted.append(request.request_id)
        if self._error is not None:
            raise self._error

    def hand_over(self, **different: object) -> None:
        """One request, as vLLM does it."""
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
    """VLLM's word for a connector is no request: there is nothing to compute, to refuse or to forget."""
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
    """HTTP 400 before the runtime has heard of it."""
    desk = Desk()
    with pytest.raises(GracefulHTTPError) as raised:
        desk.hand_over(**fault)
    assert raised.value.http_status == HTTPStatus.BAD_REQUEST
    assert (desk.submitted, desk.forgotten) == ([], ["r"])


def test_an_id_in_use_forgets_nobody() -> None:
    """HTTP 409 for the newcomer; under its id the books hold the other one, which goes on."""
    desk = Desk(RequestIdInUseError("r"))
    with pytest.raises(GracefulHTTPError) as raised:
        desk.hand_over()
    assert raised.value.http_status == HTTPStatus.CONFLICT
    assert desk.forgotten == []


def test_ids_that_clients_choose_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one front-end process too: a client could end another one's stream by using its id."""
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    with pytest.raises(ConfigError, match=r"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION.*unset it"):
        check_api_servers(Namespace(api_server_count=None))
    monkeypatch.delenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION")
    check_api_servers(Namespace(api_server_count=None))


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
    """HTTP 400 before anything is noted anywhere; sent to an engine it would fail there, in a task that nobody waits for."""
    llm = CascadeLLM.__new__(CascadeLLM)
    with pytest.raises(GracefulHTTPError, match=r"cannot be sent to an engine|request_id must be") as raised:
        asyncio.run(llm.add_request(request_id, "prompt", params))
    assert raised.value.http_status == HTTPStatus.BAD_REQUEST
