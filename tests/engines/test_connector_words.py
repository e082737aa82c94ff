"""Whose parameters the connector obeys, and what impossible ones lead to. Runs against vLLM's own scheduler."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_bed import BLOCK, SchedulerBed, greedy, make_bed
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.attachment import Attachment
from cascadeinfer.engines.vllm.connector.words import CLIENT_KEY, KEY, TOKEN_VARIABLE, Desk, with_words

PROMPT = list(range(20, 60))
N_PROMPT = 40
N_TICKET = 39
TICKET = {
    "cascade_prompt_tokens": 30,
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[3, 4, 5]],
    "remote_engine_id": "peer",
    "remote_request_id": "there",
    "remote_host": "127.0.0.1",
    "remote_port": 4321,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": N_TICKET,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
}
"""What the front end says about a request that was cut after 10 output tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def bed(model: Path) -> SchedulerBed:
    """An empty scheduler."""
    return make_bed(model)


def with_client_words(words: Any, key: str = CLIENT_KEY) -> SamplingParams:
    """As vLLM's serving layer passes on a client's parameters."""
    return greedy(4, extra_args={key: words})


def runs_as_if_not_there(bed: SchedulerBed, params: SamplingParams) -> None:
    """A request with these parameters gets its tokens; nothing is pulled or pinned, and nothing is left over."""
    bed.add("a", PROMPT, params)
    bed.steps(6)
    assert bed.tokens["a"] == [7, 7, 7, 7]
    assert bed.ends["a"].kv_transfer_params is None
    assert not bed.failed("a")
    assert not bed.pulled
    assert bed.holds_nothing()


def test_the_front_end_is_heard(bed: SchedulerBed) -> None:
    """The front end's parameters pull what a ticket names, and the request continues after its output so far."""
    request = bed.add("a", PROMPT, bed.words(greedy(14), **TICKET))
    assert (request.num_prompt_tokens, request.num_output_tokens) == (30, 10)
    bed.step()
    [pull] = bed.pulled
    assert (pull.remote.engine_id, pull.remote.block_ids, pull.remote.num_tokens) == ("peer", [[3, 4, 5]], N_TICKET)
    bed.steps(6)
    assert bed.tokens["a"] == [7] * 4
    assert bed.load()["pulls"] == 1
    assert bed.holds_nothing()


@pytest.mark.parametrize(
    "words",
    [
        TICKET,
        {"cascade_prompt_tokens": "x"},
        {"do_remote_prefill": True},
        {"do_remote_decode": True},
        {
            "do_remote_decode": True,
            "remote_block_ids": [[1]],
            "remote_engine_id": "e",
            "remote_host": "h",
            "remote_port": 1,
        },
        ["not a dict"],
        "words",
        7,
    ],
    ids=["ticket", "internal word", "remote prefill", "remote decode", "turn two", "list", "text", "number"],
)
@pytest.mark.parametrize("key", [CLIENT_KEY, KEY])
def test_a_client_is_not(bed: SchedulerBed, words: Any, key: str) -> None:
    """Whatever a client says, under its own key or ours, no engine dies of it, connects anywhere, reads or pins."""
    runs_as_if_not_there(bed, with_client_words(words, key))


@pytest.mark.parametrize("token", [None, "", "the toke", 7, b"the token", "\ud800", "ü", ["the token"]])
def test_the_token_counts(bed: SchedulerBed, token: Any) -> None:
    """Our parameters without the token are ignored."""
    runs_as_if_not_there(bed, with_client_words({"token": token, "words": TICKET}, KEY))


def test_both_at_once(bed: SchedulerBed) -> None:
    """A client's parameters next to ours change nothing."""
    params = greedy(
        14, extra_args={CLIENT_KEY: {"do_remote_decode": True}, KEY: {"token": "guess", "words": {}}, "other": 1}
    )
    request = bed.add("a", PROMPT, bed.words(params, **TICKET))
    assert request.kv_transfer_params is not None
    assert request.kv_transfer_params["remote_engine_id"] == "peer"
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {"other": 1}
    assert params.extra_args is not None
    assert len(params.extra_args) == 3, "the client's own parameters were changed"


def test_the_token_goes_no_further(bed: SchedulerBed) -> None:
    """The token is neither in what goes to the workers nor in what is logged when a step fails."""
    bed.add("a", PROMPT, bed.words(greedy(14), **TICKET))
    bed.add("b", PROMPT, bed.words(greedy(14), cascade_prompt_tokens=3))
    for _ in range(3):
        output = bed.scheduler.schedule()
        assert bed.token not in repr(output)
        assert TOKEN_VARIABLE not in os.environ
    assert bed.token not in repr(bed.config)
    assert "secret" not in repr(Attachment(0, 1, {}, "", "", "", "secret"))


def test_without_a_token_nobody_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that somebody else started obeys no parameters, not even those under an empty token."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for token in ("", "None"):
        request = Request("a", PROMPT, with_words(greedy(), TICKET, token), None)
        assert Desk.of_this_process().take(request) is None
        assert request.kv_transfer_params is None


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "no prompt": {"cascade_prompt_tokens": 0},
    "prompt too long": {"cascade_prompt_tokens": N_PROMPT + 1},
    "prompt is text": {"cascade_prompt_tokens": "x"},
    "prompt is true": {"cascade_prompt_tokens": True},
    "prompt is none": {"cascade_prompt_tokens": None},
    "reservation is no name": {"cascade_reservation": ["r"]},
    "no engine": {"remote_engine_id": None},
    "no request": {"remote_request_id": 5},
    "no host": {"remote_host": b"h"},
    "no port": {"remote_port": 0},
    "port too high": {"remote_port": 70000},
    "no ranks": {"tp_size": None},
    "ranks are text": {"pp_size": "1"},
    "no tokens": {"remote_num_tokens": 0},
    "tokens are a fraction": {"remote_num_tokens": 39.0},
    "no blocks": {"remote_block_ids": None},
    "blocks are text": {"remote_block_ids": "abc"},
    "no group": {"remote_block_ids": []},
    "two groups": {"remote_block_ids": [[1, 2, 3], [1, 2, 3]]},
    "too few blocks": {"remote_block_ids": [[1, 2]]},
    "too many blocks": {"remote_block_ids": [[1, 2, 3, 4]]},
    "a block below none": {"remote_block_ids": [[1, 2, -3]]},
    "a block is text": {"remote_block_ids": [[1, 2, "3"]]},
    "an expiry that is no time": {"remote_blocks_expiry_time": "soon"},
    "a deadline that is no time": {"cascade_pull_before": "soon"},
    "a deadline that is no number": {"cascade_pull_before": float("nan")},
    "to be pulled": {"do_remote_prefill": False, "do_remote_decode": True},
    "to be pulled and pulls": {"do_remote_decode": 1},
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_impossible_words_end_their_request(model: Path, wrong: str, asynchronous: bool) -> None:
    """Impossible parameters under the token end their request with an error and release its reservation only."""
    bed = make_bed(model, asynchronous=asynchronous)
    bed.side.reservations.reserve("mine", N_PROMPT)
    bed.add("good", PROMPT, greedy(5))
    bed.add("bad", PROMPT, bed.words(greedy(14), **{**TICKET, "cascade_reservation": "mine", **IMPOSSIBLE[wrong]}))
    bed.steps(8)
    assert bed.failed("bad")
    assert bed.tokens["good"] == [7] * 5
    assert not bed.pulled
    bed.side.reservations.release("mine")
    assert bed.holds_nothing()


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {"prompt_embeds": True}),
        (PROMPT, {"resumable": True}),
        (PROMPT, {"prompt_is_token_ids": [True] * N_PROMPT}),
    ],
    ids=["embeddings", "streaming input", "mixed"],
)
def test_prompts_that_cannot_be_split(bed: SchedulerBed, prompt: list[int] | None, options: dict[str, Any]) -> None:
    """Parameters for a request that cannot continue elsewhere end it."""
    if "prompt_embeds" in options:
        import torch

        options = {"prompt_embeds": torch.zeros(N_PROMPT, 8)}
    request = bed.add("bad", prompt, bed.words(greedy(14), cascade_prompt_tokens=5), **options)
    assert bed.side.cut(request) == "unmovable"
    bed.steps(3)
    assert bed.failed("bad")
    assert bed.holds_nothing()


def test_a_request_without_sampling_cannot_be_cut(bed: SchedulerBed) -> None:
    """Cutting a pooling request is refused, and so is undoing the cut; neither raises."""
    from vllm.pooling_params import PoolingParams

    request = bed.add("a", PROMPT, None, pooling_params=PoolingParams(task="embed"))
    assert bed.side.cut(request) == "unmovable"
    assert not bed.side.undo_cut(request)


ANYTHING = st.recursive(  # vLLM itself refuses integers that do not fit into a message
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SOME_WORDS = st.dictionaries(
    st.sampled_from([*TICKET, "cascade_reservation", "cascade_pull_before", "_p_side_truncated", "x"]), ANYTHING
)
ONE_OFF = st.tuples(st.sampled_from([*TICKET, "cascade_reservation", "cascade_pull_before"]), ANYTHING).map(
    lambda pair: {**TICKET, pair[0]: pair[1]}
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(words=SOME_WORDS | ONE_OFF | ANYTHING, key=st.sampled_from([CLIENT_KEY, KEY]))
def test_nothing_a_client_says_matters(model: Path, words: Any, key: str) -> None:
    """Any parameters, under any key."""
    runs_as_if_not_there(make_bed(model), with_client_words(words, key))


@quick
@given(words=SOME_WORDS | ONE_OFF, asynchronous=st.booleans(), pulls_come=st.booleans(), skips=st.booleans())
def test_no_words_under_the_token_end_an_engine(
    model: Path, words: dict[str, Any], asynchronous: bool, pulls_come: bool, skips: bool
) -> None:
    """
    With any parameters under the token, a request gets its tokens or ends with an error, even if aborted in between.
    Nothing is left over.
    """
    bed = make_bed(model, asynchronous=asynchronous)
    bed.pulls_come = pulls_come
    params = greedy(14, skip_reading_prefix_cache=True) if skips else greedy(14)
    bed.add("odd", PROMPT, bed.words(params, **words))
    bed.add("good", PROMPT[: BLOCK + 1], greedy(5))
    bed.steps(4)
    if not pulls_come:
        bed.scheduler.finish_requests("odd", RequestStatus.FINISHED_ABORTED)
        bed.steps(3)
        bed.pulls_come = True
    bed.steps(18)
    assert bed.tokens["good"] == [7] * 5
    assert "odd" in bed.ends or not pulls_come
    assert bed.holds_nothing()
