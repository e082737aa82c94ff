"""Connector parameters that a client sends are found wherever vLLM would read them, and nowhere else."""

import importlib
import json
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm.entrypoints
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from cascadeinfer.frontend.contents.bodies import Bodies, needs_a_look
from cascadeinfer.frontend.contents.limits import ContentLimits
from cascadeinfer.frontend.contents.params import ContentRefusedError, check_sendable, checked_params
from cascadeinfer.frontend.contents.words import CONTAINERS, FORBIDDEN, forbidden_words, without_words

TICKET = {"do_remote_prefill": True}
FORGED = [
    {"kv_transfer_params": TICKET},
    {"ec_transfer_params": TICKET},
    {"vllm_xargs": {"kv_transfer_params": TICKET}},
    {"sampling_params": {"extra_args": {"kv_transfer_params": TICKET}}},
    {"extra_body": {"kv_transfer_params": TICKET}},
    [{"prompt": "x"}, {"kv_transfer_params": TICKET}],
    {"kv_transfer_params": {}},
    {"kv_transfer_params": "x"},
]
HONEST = [
    {},
    {"kv_transfer_params": None},
    {"messages": [{"role": "user", "content": "what is kv_transfer_params?"}]},
    {"tools": [{"function": {"parameters": {"properties": {"kv_transfer_params": {"type": "object"}}}}}]},
    {"metadata": {"kv_transfer_params": "x"}},
    {"vllm_xargs": {"session_id": "kv_transfer_params"}},
]


def request_models() -> Iterator[type[BaseModel]]:
    """Every model in vLLM's protocols that describes a request."""
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.rpartition(".")[2] not in {"protocol", "protocols"}:
            continue
        try:
            content = vars(importlib.import_module(module.name))
        except ModuleNotFoundError:  # an API that needs a package of its own: it cannot be served without it
            continue
        for value in content.values():
            if isinstance(value, type) and issubclass(value, BaseModel) and "Request" in value.__name__:
                yield value


def test_every_field_of_vllm_that_reaches_a_connector_is_known() -> None:
    """
    No request has any other field for a connector, or any other that is passed on unchanged, at any depth of its
    models.
    """
    models = list(request_models())
    assert len(models) > 15
    named = set()
    for model in models:
        for name, field in model.model_fields.items():
            if "transfer" in name or "connector" in name or name.endswith(("xargs", "extra_args", "kv_hints")):
                named.add(name)
            nested = [t for t in (field.annotation, *typing.get_args(field.annotation)) if t is SamplingParams]
            assert not nested or name in CONTAINERS
    assert named == {*FORBIDDEN, "vllm_xargs"}


@pytest.mark.parametrize("body", FORGED, ids=repr)
def test_forged_words_are_found(body: Any) -> None:
    """Nothing of them is left once they are removed."""
    assert next(forbidden_words(body))[-1] in FORBIDDEN
    assert not list(forbidden_words(without_words(body)))


@pytest.mark.parametrize("body", HONEST, ids=repr)
def test_honest_bodies_are_left_alone(body: Any) -> None:
    """The same characters in a text, a tool's schema or metadata mean nothing; null is what clients send for "none"."""
    assert not list(forbidden_words(body))


class Server:
    """Records what reached it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def sent(body: bytes, *, ignores_words: bool = False, parts: int = 3) -> tuple[int, Server, bytes]:
    """Status and body of the answer to a body sent in parts, and what the server saw."""
    step = len(body) // parts + 1
    messages: list[Message] = [
        {"type": "http.request", "body": body[at : at + step], "more_body": at + step < len(body)}
        for at in range(0, len(body) or 1, step)
    ]
    server, answers = Server(), list[Message]()

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", str(len(body)).encode())]}
    await Bodies(server, ContentLimits(ignores_words=ignores_words))(scope, receive, send)
    return answers[0]["status"], server, answers[-1]["body"]


DISGUISES = [
    lambda text: text.encode(),
    lambda text: text.replace("kv_", "\\u006bv_").encode(),
    lambda text: text.replace("transfer", "tr\\u0061nsfer").encode(),
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-16-le"),
    lambda text: text.encode("utf-32"),
    lambda text: b"\xef\xbb\xbf" + text.encode(),
    lambda text: (" " * 10 + text).encode(),
    lambda text: text.replace('{"kv', '{"kv_transfer_params": null, "kv').encode(),
]


@pytest.mark.parametrize("disguise", DISGUISES)
async def test_no_disguise_gets_through(disguise: Any) -> None:
    """Escapes, other encodings, a repeated name: whatever vLLM's decoder would read as a forbidden field is refused."""
    body = disguise(json.dumps({"kv_transfer_params": TICKET, "prompt": "x"}))
    try:
        json.loads(body)
    except ValueError:
        pytest.skip("vLLM's decoder does not take it either")
    status, server, answer = await sent(body)
    assert status == 400
    assert not server.bodies
    assert json.loads(answer)["error"]["param"] == "kv_transfer_params"


@pytest.mark.parametrize("depth", [400, 700, 900, 990, 5000])
@pytest.mark.parametrize("opening", ['{"extra_body":', "["])
async def test_words_in_deep_nests_are_refused(depth: int, opening: str) -> None:
    """The search has a limit of its own. A body beyond it is refused, unless vLLM's decoder refuses it by itself."""
    body = opening * depth + json.dumps({"kv_transfer_params": TICKET}) + ("}" if "{" in opening else "]") * depth
    status, server, _ = await sent(body.encode())
    if status != 400:
        with pytest.raises(RecursionError):
            json.loads(server.bodies[0])


async def test_ignored_words_do_not_reach_vllm() -> None:
    """With `ignore`, the request is served as if the fields were absent, and its content length is corrected."""
    body = json.dumps(
        {"kv_transfer_params": TICKET, "vllm_xargs": {"kv_transfer_params": TICKET, "a": 1}, "prompt": "x"}
    )
    status, server, _ = await sent(body.encode(), ignores_words=True)
    assert status == 200
    assert json.loads(server.bodies[0]) == {"vllm_xargs": {"a": 1}, "prompt": "x"}
    assert dict(server.scopes[0]["headers"])[b"content-length"] == str(len(server.bodies[0])).encode()


BIG: Any = {"enum": list(range(6000))}
TAG: Any = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": BIG, "end": "</f>"}],
    "triggers": ["<f>"],
}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": TAG},
        {"text": {"format": TAG}},
        {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
        {"structured_outputs": {"structural_tag": TAG}},
    ],
    ids=["response_format", "text", "text of a tag", "tag"],
)
async def test_structural_tags_are_measured_before_vllm_sees_them(body: Any) -> None:
    """Otherwise vLLM would compile them while it parses the request, and everybody would wait."""
    for text in (json.dumps(body), json.dumps(body).replace("structural_tag", "structur\\u0061l_tag")):
        status, server, answer = await sent(text.encode())
        assert status == 400
        assert not server.bodies
        assert "--structured-max-alternatives" in json.loads(answer)["error"]["message"]
    small = json.dumps(body).replace(json.dumps(BIG)[1:-1], '"type": "string"')
    assert (await sent(small.encode()))[0] == 200 or "\\" in small


@given(st.binary(max_size=200), st.integers(1, 5))
async def test_other_bodies_pass_to_the_byte(body: bytes, parts: int) -> None:
    """Whatever the body is: JSON, a form with a file, or nothing at all."""
    status, server, _ = await sent(body, parts=parts)
    assert status == 200
    assert server.bodies == [body]


@given(st.recursive(st.none() | st.integers() | st.text(), lambda t: st.lists(t) | st.dictionaries(st.text(), t)))
def test_what_is_not_decoded_holds_no_word(content: Any) -> None:
    """The quick look at the bytes never misses a field that the decoder would find."""
    for body in (json.dumps(content).encode(), json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")):
        if not needs_a_look(body):
            assert not list(forbidden_words(content))


@pytest.mark.parametrize("word", FORBIDDEN)
def test_the_last_look_catches_every_api(word: str) -> None:
    """Whatever API a request came by, the engine client refuses such fields or drops them."""
    limits = ContentLimits()
    with pytest.raises(ContentRefusedError, match=word):
        checked_params(SamplingParams(extra_args={word: TICKET}), limits)
    with pytest.raises(ContentRefusedError, match=word):
        checked_params(PoolingParams(task="embed", extra_kwargs={word: TICKET}), limits)
    ignoring = ContentLimits(ignores_words=True)
    assert checked_params(SamplingParams(extra_args={word: TICKET, "a": 1}), ignoring).extra_args == {"a": 1}
    assert checked_params(SamplingParams(extra_args={"a": 1}), limits).extra_args == {"a": 1}


@pytest.mark.parametrize("name", ["x" * 257, "", "a b", "a\nb", 'a"b', "é"])
def test_ids_that_bodies_choose_are_as_plain_as_the_header(name: str) -> None:
    """They go into the same logs."""
    with pytest.raises(ContentRefusedError, match="request_id"):
        check_sendable(name, None)
    check_sendable("chatcmpl-" + "x" * 128 + "-0", None)
