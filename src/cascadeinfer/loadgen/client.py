"""
One streamed request to an OpenAI server, and what is observed of it.

Nothing is retried: a request that fails is a failure of the server under this load, and is recorded as one. Chunks are
decoded into a few typed fields only, because in many tests the client shares the machine with the server, and each
token costs a chunk.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, Self

import aiohttp
import msgspec

from cascadeinfer.core.errors import ConfigError

Api = Literal["completions", "chat"]

PATHS: Final[dict[Api, str]] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
DETAIL_CHARACTERS: Final = 200
CONNECT_TIMEOUT_S: Final = 30.0
SETUP_TIMEOUT_S: Final = 60.0
LINE_BYTES: Final = 1 << 20
"""Longest line of a stream; a one-token chunk has a few hundred bytes."""
REFUSALS: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_token(self) -> bool:
        """
        Whether the chunk has a token. A token's text may be empty in completions, but a chat's first chunk only names
        the role.
        """
        delta = self.delta
        if delta is None:
            return True
        return bool(delta.content or delta.reasoning or delta.reasoning_content or self.finish_reason)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class Answer:
    """
    The outcome of one request. Times are on the clock given to the client; NaN where something never happened.

    Attributes:
        sent_s: When the client began to send it.
        first_token_s: When its first token arrived.
        last_token_s: When its last token so far arrived.
        status: HTTP status, or the code of an error in the stream; 0 without an answer.
        prompt_tokens: As counted by the server; 0 when it does not say.
        produced_tokens: As counted by the server; number of chunks when it does not say.
        cached_tokens: Cached prompt tokens, as reported by the server.
        counted_by_chunks: Whether the server sent no usage.
        finish_reason: As in the stream; empty without one.
        error: What went wrong: kind, colon, detail. Empty when nothing did.
        refused: Whether the server said that it is overloaded (429, 503).
    """

    sent_s: float = math.nan
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    status: int = 0
    prompt_tokens: int = 0
    produced_tokens: int = 0
    cached_tokens: int = 0
    counted_by_chunks: bool = True
    finish_reason: str = ""
    error: str = ""

    @property
    def refused(self) -> bool:
        """Whether the server said that it is overloaded."""
        return self.status in REFUSALS


class OpenAiClient:
    """Requests to one server, over as many connections as there are concurrent requests."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, api: Api, model: str) -> None:
        self._session = session
        self._path = url + PATHS[api]
        self.url = url
        self.api = api
        self.model = model

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, *, api: Api = "completions", model: str | None = None, api_key: str | None = None
    ) -> AsyncIterator[Self]:
        """
        A client of the server at `url` (with or without `/v1`), for its only or first model unless one is named.

        Raises:
            ConfigError: There is no such server, or it names no model.
        """
        origin = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        # One connection per request, as if from as many users: a server may close a kept-alive one just as the next
        # request is sent on it.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, read_bufsize=LINE_BYTES
        ) as session:
            yield cls(session, origin, api=api, model=model or await _first_model(session, origin))

    def body(self, prompt: str | list[int], output_tokens: int) -> bytes:
        """The request for exactly `output_tokens` greedy tokens; `ignore_eos` is a parameter of vLLM and SGLang."""
        content: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.api == "chat":
            content["messages"] = [{"role": "user", "content": prompt}]
        else:
            content["prompt"] = prompt
        return msgspec.json.encode(content)

    async def stream(
        self, body: bytes, output_tokens: int, now_s: Callable[[], float], *, timeout_s: float, request_id: str
    ) -> Answer:
        """
        Send one request and read its stream to the end; failures are in the answer, never raised.

        Args:
            body: From `body`.
            output_tokens: Output tokens asked for.
            now_s: The clock.
            timeout_s: After this long the client gives up.
            request_id: Sent as `X-Request-Id`, so that the server's log can be matched.
        """
        answer = Answer(sent_s=now_s())
        try:
            async with asyncio.timeout(timeout_s):
                await self._read(answer, body, now_s, request_id)
        except TimeoutError:
            answer.error = f"timed out: after {timeout_s:g} s and {answer.produced_tokens} tokens"
        except aiohttp.ClientConnectorError as error:
            answer.error = f"connection failed: {_short(error)}"
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a line without end, JSON that is none
            answer.error = f"stream broken: {type(error).__name__} {_short(error)}"
        if not answer.error and answer.finish_reason not in {"length", "stop"}:
            answer.error = (
                f"incomplete: finish reason {answer.finish_reason or 'missing'!r}, {answer.produced_tokens} tokens"
            )
        elif not answer.error and answer.finish_reason == "length" and answer.produced_tokens < output_tokens:
            answer.error = f"incomplete: {answer.produced_tokens} of {output_tokens} tokens"
        return answer

    async def _read(self, answer: Answer, body: bytes, now_s: Callable[[], float], request_id: str) -> None:
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        async with self._session.post(self._path, data=body, headers=headers) as response:
            answer.status = response.status
            if response.status != HTTPStatus.OK:
                answer.error = f"HTTP {response.status}: {_short(await response.text())}"
                return
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    break
                _take(answer, _decode_chunk(data), now_s)
                if answer.error:
                    return

    async def tokenize(self, content: Mapping[str, Any], url: str | None = None) -> list[int]:
        """
        Token ids of a prompt or of messages, by vLLM's and SGLang's `/tokenize`.

        Args:
            content: `prompt` or `messages`, and options.
            url: A server with the same model, when requests go through a router without this endpoint.

        Raises:
            ConfigError: The server does not offer it.
        """
        where = (url or self.url).rstrip("/").removesuffix("/v1")
        try:
            async with (
                asyncio.timeout(SETUP_TIMEOUT_S),
                self._session.post(f"{where}/tokenize", json={"model": self.model, **content}) as response,
            ):
                if response.status != HTTPStatus.OK:
                    raise ConfigError(
                        f"{where}/tokenize answers {response.status}: {_short(await response.text())}",
                        option="--tokenize-url",
                        fix="name an engine's own URL there, or use --prompts words (lengths are then approximate)",
                    )
                return [int(token) for token in (await response.json())["tokens"]]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{where}/tokenize does not answer as it should: {_short(error)}", option="--tokenize-url"
            ) from error


def _take(answer: Answer, chunk: _Chunk, now_s: Callable[[], float]) -> None:
    """Record one chunk."""
    if chunk.error is not None:
        detail = _short(msgspec.json.encode(chunk.error).decode())
        code = chunk.error.get("code") if isinstance(chunk.error, dict) else None
        if code in REFUSALS:  # some servers refuse a stream after they have sent its head
            answer.status = code
            answer.error = f"HTTP {code}: {detail}"
        else:
            answer.error = f"error in stream: {detail}"
        return
    for choice in chunk.choices:
        if choice.has_token():
            answer.last_token_s = now_s()
            if math.isnan(answer.first_token_s):
                answer.first_token_s = answer.last_token_s
            if answer.counted_by_chunks:
                answer.produced_tokens += 1
        answer.finish_reason = choice.finish_reason or answer.finish_reason
    usage = chunk.usage
    if usage is not None and usage.completion_tokens is not None:
        answer.counted_by_chunks = False
        answer.produced_tokens = usage.completion_tokens
        answer.prompt_tokens = usage.prompt_tokens
        details = usage.prompt_tokens_details
        answer.cached_tokens = (details.cached_tokens or 0) if details is not None else 0


async def _first_model(session: aiohttp.ClientSession, origin: str) -> str:
    try:
        async with asyncio.timeout(SETUP_TIMEOUT_S), session.get(f"{origin}/v1/models") as response:
            if response.status != HTTPStatus.OK:
                raise ConfigError(
                    f"{origin}/v1/models answers {response.status}: {_short(await response.text())}",
                    option="--url",
                    fix="name the model with --model; a key is taken from OPENAI_API_KEY",
                )
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.InvalidURL, aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ConfigError(f"no server answers at {origin}: {_short(error)}", option="--url") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{origin}/v1/models names no model", option="--url", fix="--model NAME") from error


def _short(what: object) -> str:
    """A value as one short line."""
    return " ".join(str(what).split())[:DETAIL_CHARACTERS]
