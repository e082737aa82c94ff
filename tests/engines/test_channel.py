"""The command channel to an EngineCore, over a scripted client in place of vLLM's."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import EngineDied, Resume
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.connector.loads_along import LOAD as LOAD_KEY
from cascadeinfer.engines.vllm.connector.ticket import RESERVATION
from cascadeinfer.engines.vllm.connector.words import KEY
from cascadeinfer.engines.vllm.ending import fail_pending_calls
from cascadeinfer.engines.vllm.messages import EngineLoad
from cascadeinfer.engines.vllm.plain_request import request_with
from support.hello import hello as engine_hello

HELLO = engine_hello(engine_id="cascade-a-1", clock_s=1e6)
LOAD = EngineLoad(
    running=[("r", 30)],
    waiting=[("w", 7)],
    foreign_running=[100],
    foreign_waiting=[],
    kv_blocks=64,
    kv_blocks_used=9,
    reserved=1,
    pinned=["p"],
    held_blocks={"pins": 2},
    steps=5,
    timed_steps=[(1, 30, 30, 0, 0.0, 0.01)],
    scheduled_tokens=50,
    pulls=3,
    pulled_tokens=99,
    precopied_tokens=0,
    failed_pulls=0,
    listens=True,
    paused=False,
    step_budget=512,
    clock_s=1e6,
)


class Client:
    """vLLM's client, as far as the channel uses it; answers are set in advance, by command."""

    client_index = 1

    def __init__(self, **answers: Any) -> None:
        self.answers = {"cascade_load": LOAD.plain(), **answers}
        self.calls: list[tuple[Any, ...]] = []
        self.requests: list[Any] = []
        self.aborted: list[str] = []
        self.utility_results: dict[int, asyncio.Future[Any]] = {}
        self.is_dead = False

    async def call_utility_async(self, command: str, *args: Any) -> Any:
        """Answer at once, encoded and decoded as msgpack would on the wire."""
        if self.is_dead:
            raise EngineDeadError
        self.calls.append((command, *args))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.answers.get(command)))

    async def add_request_async(self, request: Any) -> None:
        """Record the request."""
        if self.is_dead:
            raise EngineDeadError
        self.requests.append(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Record the ids."""
        self.aborted += request_ids

    async def get_output_async(self) -> Any:
        """An empty step, or the engine's death."""
        if self.is_dead:
            raise EngineDeadError
        return SimpleNamespace(outputs=[], engine_index=0)


def channel_on(client: Client) -> EngineChannel:
    """A channel of the instance with number 3."""
    return EngineChannel("a", 3, client, HELLO, "token")  # type: ignore[arg-type]


async def test_a_report_is_what_the_engine_says() -> None:
    """Own requests by id, foreign ones as lengths, each step with its batch; requested under this client's number."""
    client = Client()
    report, counters = await channel_on(client).report()
    assert client.calls == [("cascade_load", 1, None)]
    assert (report.running_ids, report.running_tokens) == (("r",), (30,))
    assert (report.waiting_ids, report.foreign_running_tokens) == (("w",), (100,))
    assert (report.steps[0].batch.n_decode, report.steps[0].step_s) == (1, 0.01)
    assert (counters.pinned, counters.pulled_tokens, counters.held_blocks) == (1, 99, {"pins": 2})


async def test_a_load_comes_along_with_outputs() -> None:
    """It is read as an answer is, and the outputs are left as vLLM made them; without one there is none."""
    channel = channel_on(Client())
    outputs = EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats={LOAD_KEY: LOAD.plain()}))
    told = channel.load_in(outputs)
    assert told is not None
    assert (told[0].running_ids, told[1].steps) == (("r",), 5)
    assert outputs.scheduler_stats == SchedulerStats()
    assert channel.load_in(outputs) is None
    await channel.report(0.25)
    assert channel.client.calls == [("cascade_load", 1, 0.25)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [{"clock_s": None}, {"running": [["r"]]}, {"surplus": 1}])
async def test_an_answer_of_another_form_is_refused(wrong: dict[str, Any]) -> None:
    """A report with a missing, extra or wrongly typed field is an error on arrival, not a wrong load."""
    client = Client(cascade_load={**LOAD.plain(), **wrong})
    with pytest.raises(msgspec.ValidationError):
        await channel_on(client).report()


async def test_two_clients_reservations_have_different_names() -> None:
    """The reservation, its release and the request that claims it all carry the client's prefix."""
    client = Client()
    channel = channel_on(client)
    request = request_with("r", [1, 2, 3], SamplingParams(max_tokens=5))
    await channel.reserve("m", 10)
    await channel.release_reservation("m")
    await channel.add("r~1", request, Resume([4], None, "m"))
    assert client.calls == [("cascade_reserve", "client1/m", 10, False), ("cascade_release_reservation", "client1/m")]
    [sent] = client.requests
    assert sent.sampling_params.extra_args[KEY]["words"][RESERVATION] == "client1/m"
    assert sent.sampling_params.extra_args[KEY]["token"] == channel.connector_token
    assert (sent.request_id, sent.prompt_token_ids) == ("r~1", [1, 2, 3, 4])
    assert request.payload.request_id == "r", "the caller's request is not touched"


async def test_outputs_carry_the_instances_number() -> None:
    """Its number is what tells instances apart in vLLM's metrics."""
    assert (await channel_on(Client()).next_outputs()).engine_index == 3


async def test_death_is_told_by_the_outputs_and_to_who_waits() -> None:
    """`next_outputs` raises, pending and later calls raise, and messages without an answer raise nothing."""
    client = Client()
    channel = channel_on(client)
    pending = client.utility_results[0] = asyncio.get_running_loop().create_future()
    client.is_dead = True
    with pytest.raises(EngineDied):
        await channel.next_outputs()
    assert isinstance(pending.exception(), EngineDeadError)
    with pytest.raises(EngineError, match="died"):
        await channel.cut("r")
    await channel.add("r", request_with("r", [1], SamplingParams(max_tokens=5)))


async def test_a_closed_channel_sends_nothing() -> None:
    """Commands raise, requests and aborts go nowhere; pending calls are woken by whoever ends the client."""
    client = Client()
    channel = channel_on(client)
    pending = client.utility_results[0] = asyncio.get_running_loop().create_future()
    channel.close()
    with pytest.raises(EngineError):
        await channel.reserve("m", 1)
    with pytest.raises(EngineError):
        await channel.next_outputs()
    await channel.add("r", request_with("r", [1], SamplingParams(max_tokens=5)))
    await channel.abort(["r"])
    assert (client.calls, client.requests, client.aborted) == ([], [], [])
    assert not pending.done()
    fail_pending_calls(client)  # type: ignore[arg-type]
    assert isinstance(pending.exception(), EngineDeadError)
