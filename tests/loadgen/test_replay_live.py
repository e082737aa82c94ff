"""The load generator against a server on the loopback: open loop, exact lengths, each failure counted by its kind."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from fake_openai import Behaviour, FakeServer, running

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.loadgen.client import Answer, Api, OpenAiClient
from cascadeinfer.loadgen.prompts import WORDS, PromptKind, make_prompts
from cascadeinfer.loadgen.replay import Replay, replay
from cascadeinfer.results.estimates import errors_by_kind
from cascadeinfer.workload.trace import Trace

TRACE = Trace.from_columns([5, 30, 9, 200], [1, 4, 7, 3], [0.0, 0.0, 0.001, 0.002])


async def replayed(
    server: FakeServer,
    trace: Trace = TRACE,
    *,
    api: Api = "completions",
    kind: PromptKind = "text",
    timeout_s: float = 30.0,
) -> Replay:
    """A whole run."""
    async with running(server), OpenAiClient.connect(server.url, api=api) as client:
        maker = await make_prompts(client, trace, kind, seed=3)
        return await replay(trace, client, maker, timeout_s=timeout_s, name="test")


def always(behaviour: Behaviour) -> Callable[[int], Behaviour]:
    """The same behaviour for every request."""
    return lambda _: behaviour


@pytest.mark.parametrize(
    ("api", "kind"), [("completions", "text"), ("completions", "ids"), ("chat", "text")], ids=["text", "ids", "chat"]
)
async def test_lengths_are_those_of_the_trace(api: Api, kind: PromptKind) -> None:
    """The server counts the trace's prompt and output tokens, whatever it adds around a text."""
    server = FakeServer()
    result = await replayed(server, api=api, kind=kind)
    assert result.errors == ("",) * 4
    assert result.records.prompt_tokens.tolist() == TRACE.prompt_tokens.tolist()
    assert result.records.produced_tokens.tolist() == TRACE.output_tokens.tolist()
    assert (result.off_prompts, result.ended_early, result.counted_by_chunks) == (0, 0, 0)
    assert all(ask["ignore_eos"] and ask["stream"] and ask["temperature"] == 0 for ask in server.asked)


async def test_times_are_in_order_and_count_from_the_due_time() -> None:
    """Due <= sent <= first token <= last token; TTFT counts from the due time."""
    records = (await replayed(FakeServer())).records
    assert records.arrival_s.tolist() == TRACE.arrival_s.tolist()
    assert np.all(records.dispatched_s >= records.arrival_s - 1e-3)
    assert np.all(records.first_token_s >= records.dispatched_s)
    assert np.all(records.finish_s >= records.first_token_s)
    assert records.ttft_s.tolist() == (records.first_token_s - TRACE.arrival_s).tolist()


async def test_no_connection_is_used_twice() -> None:
    """Requests disable keep-alive: a server that closes an idle connection just then would seem to have failed."""
    server = FakeServer()
    await replayed(server)
    assert server.kept_connections == 0


async def test_requests_that_are_due_do_not_wait_for_turns_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many streams, a turn of the event loop takes long: all requests that have come due are sent together."""
    turns = 0
    sent: list[int] = []
    trace = Trace.from_columns([5] * 50, [1] * 50, [0.0] * 50)

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def stream(_self: OpenAiClient, *_args: object, **_settings: object) -> Answer:
        sent.append(turns)
        return Answer()

    async with running(FakeServer()) as server, OpenAiClient.connect(server.url) as client:
        maker = await make_prompts(client, trace, "ids", seed=3)
        monkeypatch.setattr(OpenAiClient, "stream", stream)
        turning = asyncio.create_task(turn())
        await replay(trace, client, maker, timeout_s=30.0, name="test")
        turning.cancel()
    assert len(sent) == len(trace)
    assert sent[-1] - sent[0] <= len(trace) // 5


async def test_arrivals_do_not_wait_for_answers() -> None:
    """While the server holds back every answer, all requests reach it: the loop is open."""
    gate = asyncio.Event()
    server = FakeServer(always(Behaviour(wait_for=gate)))

    async def release() -> None:
        async with server.arrived:
            await server.arrived.wait_for(lambda: len(server.asked) == len(TRACE))
        gate.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(release())
        run = group.create_task(replayed(server))
    assert run.result().errors == ("",) * 4


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(status=429), "HTTP 429"),
        (Behaviour(status=500), "HTTP 500"),
        (Behaviour(cut=1), "stream broken"),
        (Behaviour(tokens=2, clean_end=True), "incomplete"),
        (Behaviour(tokens=2, error_in_stream=True), "error in stream"),
        (Behaviour(garbage=True), "stream broken"),
    ],
    ids=["refused", "internal", "disconnect", "no end", "error event", "garbage"],
)
async def test_a_failed_request_is_counted_as_what_it_is(behaviour: Behaviour, kind: str) -> None:
    """One request in four fails in each way: it has no finish, its error names the kind, the others are unaffected."""
    trace = Trace.from_columns([5, 6, 7, 8], [4, 4, 4, 4], [0.0, 0.05, 0.1, 0.15])
    result = await replayed(FakeServer(lambda number: behaviour if number == 2 else Behaviour()), trace)
    assert errors_by_kind(result.errors) == {kind: 1}
    assert int(result.records.finished.sum()) == 3
    assert int(result.records.rejected.sum()) == (1 if behaviour.status == 429 else 0)
    failed = np.flatnonzero(~result.records.finished)
    assert all(result.errors[row] for row in failed)


async def test_a_refusal_within_a_stream_is_a_refusal() -> None:
    """A server that sends status 200 and then an overload's error event has refused the request, as with a 429."""
    refused = Behaviour(tokens=0, error_in_stream=True, error_code=429)
    trace = Trace.from_columns([5, 6], [4, 4], [0.0, 0.05])
    result = await replayed(FakeServer(lambda number: refused if number == 0 else Behaviour()), trace)
    assert errors_by_kind(result.errors) == {"HTTP 429": 1}
    assert int(result.records.rejected.sum()) == 1


async def test_a_client_leaves_a_server_that_hangs() -> None:
    """A server that never answers: the request times out, and counts as aborted."""
    gate = asyncio.Event()
    trace = Trace.from_columns([5], [4], [0.0])
    server = FakeServer(always(Behaviour(wait_for=gate)))
    async with running(server), OpenAiClient.connect(server.url) as client:
        maker = await make_prompts(client, trace, "text", seed=0)
        result = await replay(trace, client, maker, timeout_s=0.05, name="test")
        gate.set()
    assert errors_by_kind(result.errors) == {"timed out": 1}
    assert result.records.aborted.tolist() == [True]


async def test_a_server_that_is_gone_is_an_error_per_request() -> None:
    """After the server has gone, each request fails to connect; none is missing from the records."""
    server = FakeServer()
    async with running(server):
        connection = OpenAiClient.connect(server.url)
        client = await connection.__aenter__()
        maker = await make_prompts(client, TRACE, "text", seed=0)
    result = await replay(TRACE, client, maker, timeout_s=5.0, name="test")
    await connection.__aexit__(None, None, None)
    assert errors_by_kind(result.errors) == {"connection failed": 4}
    assert not result.records.finished.any()


async def test_a_server_that_ignores_ignore_eos_is_noticed() -> None:
    """Answers that stop early count with their own length, and are reported."""
    result = await replayed(FakeServer(always(Behaviour(tokens=2))))
    assert result.errors == ("",) * 4
    assert result.ended_early == 3
    assert result.records.output_tokens.tolist() == [1, 2, 2, 2]


async def test_without_usage_tokens_are_counted_by_chunks() -> None:
    """If a server sends no usage, each chunk counts as a token, which is reported."""
    result = await replayed(FakeServer(always(Behaviour(usage=False))))
    assert result.records.produced_tokens.tolist() == TRACE.output_tokens.tolist()
    assert result.counted_by_chunks == 4


async def test_prompts_share_what_the_trace_says_and_nothing_else() -> None:
    """Equal hashes give equal leading blocks; the rest differs; a seed fixes the prompt, and seeds share nothing."""
    trace = Trace.from_columns(
        [40, 40, 40], [1, 1, 1], [0.0, 0.0, 0.0], prefix_hashes=[[7, 8], [7, 9], [5, 6]], prefix_block_tokens=16
    )
    async with running(FakeServer()) as server, OpenAiClient.connect(server.url) as client:
        first = await make_prompts(client, trace, "ids", seed=0)
        again = await make_prompts(client, trace, "ids", seed=0)
        other = await make_prompts(client, trace, "ids", seed=1)
    a, b, c = (first.prompt(row) for row in range(3))
    assert a == again.prompt(0)
    assert a[:16] == b[:16]
    assert a[16:32] != b[16:32]
    assert a[:16] != c[:16]
    assert a[:16] != other.prompt(0)[:16]


async def test_words_need_no_tokenizer() -> None:
    """`words` works without /tokenize and records the server's own counts; `text` says what to do."""
    result = await replayed(FakeServer(has_tokenize=False), kind="words")
    assert result.records.prompt_tokens.tolist() == [6, 31, 10, 201]
    assert result.off_prompts == 4
    with pytest.raises(ConfigError, match="--prompts words"):
        await replayed(FakeServer(has_tokenize=False), kind="text")


async def test_a_wrong_url_is_one_clear_error() -> None:
    """No server, or one without models: ConfigError names --url."""
    with pytest.raises(ConfigError, match="--url"):
        async with OpenAiClient.connect("http://127.0.0.1:9"):
            pass


def test_words_are_apart() -> None:
    """No word occurs twice, so the pool is as large as it says."""
    assert len(set(WORDS)) == len(WORDS) > 100
