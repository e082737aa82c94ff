"""
N instances behind vLLM's `AsyncLLM`: an `EngineCoreClient` that hands requests to the runtime.

`AsyncLLM` (tokeniser, detokeniser, stop strings, logprobs, metrics) and the OpenAI server on top of it run unchanged.
They see one engine core client whose outputs carry the instance's number as engine index. Calls that concern every
instance (LoRA, pause, cache resets, profiling) go to all that are up; `agreement.py` makes one answer of theirs.
"""

import asyncio
import contextlib
import copy
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from cascadeinfer.core.errors import PolicyError, RequestIdInUseError, RequestRejectedError
from cascadeinfer.core.types import RequestId
from cascadeinfer.engines.protocol import Engine, EngineRequest
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.messages import ModelRunner
from cascadeinfer.frontend.agreement import combined
from cascadeinfer.frontend.contents.limits import ContentLimits
from cascadeinfer.frontend.contents.params import ContentRefusedError, check_sendable, checked_params
from cascadeinfer.frontend.pins import Pins
from cascadeinfer.frontend.placement import note_journey
from cascadeinfer.frontend.prefixes import prefix_hashes_of
from cascadeinfer.frontend.stats import ElasticStatLogger, StatsFollower
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.streams import Journey

TO_ALL_INSTANCES = (
    "add_lora_async",
    "collective_rpc_async",
    "compute_weight_checksums_async",
    "is_scheduler_paused_async",
    "is_sleeping_async",
    "list_loras_async",
    "pause_generation_async",
    "pause_scheduler_async",
    "pin_lora_async",
    "profile_async",
    "release_kv_cache_memory_async",
    "remove_lora_async",
    "reset_encoder_cache_async",
    "reset_mm_cache_async",
    "reset_prefix_cache_async",
    "resume_scheduler_async",
    "sleep_async",
    "wake_up_async",
    "get_weight_version_async",
    "set_weight_version_async",
)


MAX_PRIORITY = 1_000_000
"""In either direction. A number that does not fit into 64 bits cannot be sent to an engine at all."""


def _fault_in(request: EngineCoreRequest) -> str | None:
    """Why a request cannot be served here, or None."""
    if request.resumable:
        return "streaming input is not supported"
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        return f"priority must be between -{MAX_PRIORITY:,} and {MAX_PRIORITY:,}"
    return None


@dataclass(slots=True)
class Liveness:
    """
    The state behind `AsyncLLM.errored`.

    Attributes:
        engine_dead: True only after shutdown: a dead instance is restarted, and requests wait for it.
    """

    engine_dead: bool = False


def _model_runner_of(engines: Sequence[Engine]) -> ModelRunner:
    """
    The engines' model runner: V1, which preserves less across a move, if any of them uses it. They all use the same
    unless a server's instances have different environments, and then no move connects those that differ.
    """
    for engine in engines:
        assert isinstance(engine, VllmInstance)
        if engine.hello.model_runner == "V1":
            return "V1"
    return "V2"


class OverloadedError(GracefulHTTPError):
    """HTTP 429: the policy refused the request for now."""

    def __init__(self, rejected: RequestRejectedError) -> None:
        """Carry the policy's reason to the client."""
        self.retry_after_s = rejected.retry_after_s
        super().__init__(str(rejected), HTTPStatus.TOO_MANY_REQUESTS)


class CascadeEngineClient(EngineCoreClient):
    """See the module header. The runtime is started before this object is made and stopped after its last use."""

    def __init__(self, runtime: Runtime, vllm_config: VllmConfig) -> None:
        """
        Args:
            runtime: A started runtime over vLLM instances.
            vllm_config: The configuration that the instances share, as reported after their start.
        """
        self._runtime = runtime
        self._vllm_config = vllm_config
        engines = runtime.live_engines()
        self._pins = Pins(
            vllm_config,
            movable=all(engine.movable for engine in engines),
            model_runner=_model_runner_of(engines),
        )
        self.engine_ranks_managed = [engine.index for engine in engines]
        self.resources = Liveness()
        #: Makes `AsyncLLM` forget a request that it recorded before handing it over; vLLM would keep it in its books.
        self.forget: Callable[[RequestId], None] = lambda _: None
        #: Called with each request's journey, for its spans.
        self.trace: Callable[[RequestId, Journey], None] = lambda *_: None

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs of any instance."""
        outputs = await self._runtime.next_outputs()
        assert isinstance(outputs, EngineCoreOutputs)
        return outputs

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """
        Hand a request to the runtime. If this raises, no trace of the request stays in vLLM's books or ours.

        vLLM submits some requests only to abort them, so that a connector cleans up after a client's transfer; clients
        have no transfers here.
        """
        if request.abort_immediately:
            return
        try:
            await self._submit(request)
        except RequestIdInUseError as in_use:  # what the books hold under this id is the other one's
            raise GracefulHTTPError(str(in_use), HTTPStatus.CONFLICT) from in_use
        except BaseException:
            self.forget(request.request_id)
            raise

    async def _submit(self, request: EngineCoreRequest) -> None:
        if (fault := _fault_in(request)) is not None:
            raise GracefulHTTPError(fault, HTTPStatus.BAD_REQUEST)
        sampling = request.sampling_params
        try:
            await self._runtime.submit(
                EngineRequest(
                    request.request_id,
                    request.prompt_token_ids or [],
                    (sampling.max_tokens or 1) if sampling is not None else 1,
                    request,
                    self._pins.reason_of(request),
                    request.priority,
                    prefix_hashes_of(request, self._vllm_config),
                )
            )
        except RequestRejectedError as rejected:
            raise OverloadedError(rejected) from rejected
        except PolicyError as failed:
            raise GracefulHTTPError(str(failed), HTTPStatus.INTERNAL_SERVER_ERROR) from failed
        if (journey := self._runtime.journey_of(request.request_id)) is not None:
            note_journey(journey)
            self.trace(request.request_id, journey)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Abort requests whose clients left or whose stop string was found."""
        self._runtime.abort(request_ids)

    async def get_supported_tasks_async(self) -> Any:
        """Tasks of the model; checked to be the same for every instance."""
        return await self.to_all("get_supported_tasks_async")

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """A utility call to every instance."""
        return await self.to_all("call_utility_async", method, *args)

    async def to_all(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call every instance that is up, wait for all, and combine their answers; raises the first one's error."""
        engines = self._engines()
        calls = (engine.utility(method, *args, **kwargs) for engine in engines)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        told = {engine.instance_id: answer for engine, answer in zip(engines, answers, strict=True)}
        return combined(f"{args[0]}_async" if method == "call_utility_async" else method, told)

    def _engines(self) -> list[Engine]:
        """Engines that are up; at least one."""
        if not (engines := self._runtime.live_engines()):
            raise EngineDeadError
        return engines

    def dp_engines_running(self) -> bool:
        """Data-parallel waves: none here."""
        return False

    def shutdown(self, timeout: float | None = None) -> None:  # noqa: ARG002 - vLLM's signature
        """Called by AsyncLLM; the runtime is stopped by its owner."""
        self.resources.engine_dead = True


def _to_all(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(self: CascadeEngineClient, *args: Any, **kwargs: Any) -> Any:
        return await self.to_all(name, *args, **kwargs)

    call.__name__ = name
    call.__doc__ = f"`{name}` of every instance that is up."
    return call


for _name in TO_ALL_INSTANCES:
    setattr(CascadeEngineClient, _name, _to_all(_name))


class CascadeLLM(AsyncLLM):
    """`AsyncLLM` whose health is that of the runtime: healthy while any instance is up."""

    runtime: Runtime
    #: What requests may contain; the server sets the operator's limits.
    content_limits = ContentLimits()

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Check a request before anything of it is compiled or handed over; every API passes through here."""
        try:
            params = checked_params(params, self.content_limits)
            check_sendable(request_id, params)
        except ContentRefusedError as refused:
            raise GracefulHTTPError(str(refused), HTTPStatus.BAD_REQUEST) from refused
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Abort requests by the ids that their clients know, or by those that `/admin/instances` lists."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        processor = self.output_processor
        listed = [i for i in request_ids if i in processor.request_states or i in processor.parent_requests]
        if not internal and listed:
            await super().abort(listed, internal=True)
            request_ids = [i for i in request_ids if i not in listed]
        if request_ids:
            await super().abort(request_ids, internal=internal)

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:
        """VLLM reports that a client's transfer is cancelled. No client has one here."""

    async def check_health(self) -> None:
        """Raise while no instance is up."""
        if self.errored or not self.runtime.live_engines():
            raise EngineDeadError

    def forget_request(self, request_id: RequestId) -> None:
        """
        Remove a refused request from the books, with its siblings (`n` > 1): their client gets the refusal.

        Anything this puts into the client's queue meanwhile is not seen if an exception is already there.
        """
        state = self.output_processor.request_states.get(request_id)
        parent = None if state is None else state.parent_req
        dropped = self.output_processor.abort_requests([request_id], internal=True)
        if parent is not None:
            dropped += self.output_processor.abort_requests([parent.request_id], internal=True)
        self.runtime.abort(dropped)

    def refuse_late(self, request_id: RequestId, rejected: RequestRejectedError) -> None:
        """Refuse a request that waits for its first token: its client gets the HTTP 429 of an immediate refusal."""
        self._end_with(request_id, OverloadedError(rejected))

    def fail(self, request_id: RequestId, sentence: str) -> None:
        """Fail a request that cannot continue: its client gets HTTP 500, or its stream an error, with this sentence."""
        self._end_with(request_id, GracefulHTTPError(sentence, HTTPStatus.INTERNAL_SERVER_ERROR))

    def _end_with(self, request_id: RequestId, error: GracefulHTTPError) -> None:
        state = self.output_processor.request_states.get(request_id)
        if state is not None and state.queue is not None:
            state.queue.put(error)
        self.forget_request(request_id)


@contextlib.contextmanager
def _as_engine_core_client(client: CascadeEngineClient) -> Iterator[None]:
    """Have vLLM's factory return our client; `AsyncLLM.__init__` offers no parameter for it."""
    original = EngineCoreClient.__dict__["make_async_mp_client"]
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: client)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original


def with_whole_media(vllm_config: VllmConfig) -> VllmConfig:
    """
    A configuration with which the front end sends processed images, audio and video with each request.

    VLLM's front end of one engine leaves out what it has sent before, because the engine keeps it in a cache of its
    own. With several instances, the one that gets a request may never have seen it. Several front ends of one engine
    have the same problem, and vLLM's remedy for them is the right one here.
    """
    own = copy.copy(vllm_config)
    own.parallel_config = copy.copy(vllm_config.parallel_config)
    own.parallel_config._api_process_count = max(2, vllm_config.parallel_config._api_process_count)  # noqa: SLF001
    return own


def make_llm(runtime: Runtime, vllm_config: VllmConfig, *, log_stats: bool, log_requests: bool) -> CascadeLLM:
    """
    `AsyncLLM` over a started runtime. Must be called in the runtime's event loop.

    Args:
        log_stats: Whether vLLM's metrics are kept.
        log_requests: Whether vLLM logs each request.
    """
    vllm_config = with_whole_media(vllm_config)
    client = CascadeEngineClient(runtime, vllm_config)
    with _as_engine_core_client(client):
        llm = CascadeLLM(
            vllm_config,
            Executor.get_class(vllm_config),
            log_stats,
            usage_context=UsageContext.OPENAI_API_SERVER,
            log_requests=log_requests,
            stat_loggers=[ElasticStatLogger] if log_stats else None,
        )
    llm.runtime = runtime
    client.forget = llm.forget_request
    if vllm_config.observability_config.otlp_traces_endpoint is not None:
        from cascadeinfer.frontend.tracing import traced  # noqa: PLC0415 - OpenTelemetry is loaded only if it is used

        if (tracing := traced(llm.output_processor)) is not None:
            client.trace = tracing.note
    runtime.on_late_refusal = llm.refuse_late
    runtime.on_failure = llm.fail
    if llm.logger_manager is not None:
        runtime.fleet.watchers.append(StatsFollower(llm.logger_manager, vllm_config, runtime.live_engines()))
    return llm
