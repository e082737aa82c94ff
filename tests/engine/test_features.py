"""Every request feature survives moves or pins the request (vLLM's `AsyncLLM`, compared with no moves)."""

import asyncio
import json
import re
from typing import Any

import pytest
from zoo import greedy, random_prompt

from cluster import BEYOND_EDGES, Cluster

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

N_OUTPUT = 130
PROMPT = random_prompt(40, 3)
"""With this much output it crosses both stage edges."""


async def moved_and_alone(cluster: Cluster, params: Any, prompt: Any = PROMPT) -> tuple[Any, Any]:
    """Run the request with moves, which must happen, and without."""
    alone = await cluster.alone(prompt, params)
    moves = cluster.migrations("moved")
    moved = await cluster.run(prompt, params, hold_at=BEYOND_EDGES)
    assert cluster.migrations("moved") > moves, "it did not move"
    return moved, alone


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"logit_bias": {100: 6.0, 200: 5.0}},
        {"allowed_token_ids": list(range(40, 300))},
        {"min_tokens": 100, "stop_token_ids": [90, 120, 150]},
        {"skip_special_tokens": False},
        {"top_k": 1, "min_p": 0.1},
    ],
    ids="+".join,
)
async def test_option_survives(cluster: Cluster, options: dict[str, Any]) -> None:
    """Sampling options whose only state is in the tokens give the same output with moves."""
    [moved], [alone] = await moved_and_alone(cluster, greedy(N_OUTPUT, **options))
    assert moved.token_ids == alone.token_ids
    assert (moved.text, moved.finish_reason, moved.stop_reason) == (
        alone.text,
        alone.finish_reason,
        alone.stop_reason,
    )


async def test_stop_string_across_a_move(cluster: Cluster) -> None:
    """A stop string whose tokens come from two instances ends the output at the same character."""
    [whole] = await cluster.alone(PROMPT, greedy(N_OUTPUT))
    stop = whole.text[60:260]
    assert stop not in whole.text[:-1].replace(stop, "", 1)
    [moved], [alone] = await moved_and_alone(cluster, greedy(N_OUTPUT, stop=[stop]))
    assert moved.text == alone.text == whole.text[:60]
    assert moved.finish_reason == "stop"
    assert moved.stop_reason == stop


async def test_stop_string_after_the_moves(cluster: Cluster) -> None:
    """A stop string that appears on the last instance ends the request there."""
    [whole] = await cluster.alone(PROMPT, greedy(N_OUTPUT))
    stop = whole.text[-12:-4]
    [moved], [alone] = await moved_and_alone(cluster, greedy(N_OUTPUT, stop=[stop], include_stop_str_in_output=True))
    assert moved.text == alone.text
    assert moved.text.endswith(stop)


async def test_regex_grammar(cluster: Cluster) -> None:
    """A regular expression continues where it was: the text with moves is the same, and matches."""
    from vllm.sampling_params import StructuredOutputsParams

    pattern = r"([a-f]{3}-[0-9]{2},){20}end"
    params = greedy(400, structured_outputs=StructuredOutputsParams(regex=pattern), eos_id=2)
    [moved], [alone] = await moved_and_alone(cluster, params)
    assert moved.text == alone.text
    assert re.fullmatch(pattern, moved.text)


async def test_json_schema(cluster: Cluster) -> None:
    """A JSON schema continues where it was: the text with moves is the same, and conforms."""
    from vllm.sampling_params import StructuredOutputsParams

    items = {"type": "string", "enum": ["red", "green", "blue"]}
    colours = {"type": "array", "items": items, "minItems": 25, "maxItems": 30}
    schema = {"type": "object", "properties": {"colours": colours}, "required": ["colours"]}
    params = greedy(600, structured_outputs=StructuredOutputsParams(json=schema), eos_id=2)
    [moved], [alone] = await moved_and_alone(cluster, params)
    assert moved.text == alone.text
    assert 25 <= len(json.loads(moved.text)["colours"]) <= 30


async def test_logprobs(cluster: Cluster) -> None:
    """Every token has one set of log-probabilities, with the values and ranks of one instance alone."""
    [moved], [alone] = await moved_and_alone(cluster, greedy(N_OUTPUT, logprobs=3))
    assert len(moved.logprobs) == len(alone.logprobs) == N_OUTPUT
    for here, there in zip(moved.logprobs, alone.logprobs, strict=True):
        assert {i: e.rank for i, e in here.items()} == {i: e.rank for i, e in there.items()}
        assert [e.logprob for e in here.values()] == pytest.approx([e.logprob for e in there.values()], abs=1e-3)
    assert moved.cumulative_logprob == pytest.approx(alone.cumulative_logprob, abs=1e-2)


async def test_several_completions(cluster: Cluster) -> None:
    """With `n=2` both completions move, and both equal those of one instance."""
    from vllm.sampling_params import RequestOutputKind

    [alone] = await cluster.alone(PROMPT, greedy(N_OUTPUT))
    params = greedy(N_OUTPUT, output_kind=RequestOutputKind.FINAL_ONLY)
    params.n, params.temperature, params.top_k = 2, 1.0, 1  # vLLM refuses n > 1 at temperature 0
    moves = cluster.migrations("moved")
    both = await cluster.run(PROMPT, params, hold_at=BEYOND_EDGES)
    assert [completion.token_ids for completion in both] == [alone.token_ids] * 2
    assert cluster.migrations("moved") >= moves + 2


@pytest.mark.parametrize("interval", [1, 7])
async def test_stream_has_every_token_once(cluster: Cluster, interval: int) -> None:
    """A stream's deltas concatenate to the output: no token twice, none missing, in order."""
    from vllm.sampling_params import RequestOutputKind

    [alone] = await cluster.alone(PROMPT, greedy(N_OUTPUT))
    params = greedy(N_OUTPUT, output_kind=RequestOutputKind.DELTA, stream_interval=interval)
    moves = cluster.migrations("moved")
    token_ids: list[int] = []
    text = ""
    async for output in cluster.stream(PROMPT, params, hold_at=BEYOND_EDGES):
        token_ids += output.outputs[0].token_ids
        text += output.outputs[0].text
    assert cluster.migrations("moved") > moves
    assert (token_ids, text) == (list(alone.token_ids), alone.text)


ONLY_V1_PINS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"temperature": 0.8, "seed": 7}, "seeded_sampling"),
    "presence": ({"presence_penalty": 0.5}, "token_penalties"),
    "frequency": ({"frequency_penalty": 0.5}, "token_penalties"),
    "bad_words": ({"bad_words": ["hello there"]}, "bad_words"),
}


@pytest.mark.runner("V2")
@pytest.mark.parametrize("name", ONLY_V1_PINS)
async def test_what_only_v1_pins_moves(cluster: Cluster, name: str) -> None:
    """On V2 the same requests move, and their output is the same as without any moves."""
    from vllm.sampling_params import SamplingParams

    options, _ = ONLY_V1_PINS[name]
    params = SamplingParams(max_tokens=N_OUTPUT, ignore_eos=True, **{"temperature": 0.0, **options})
    [moved], [alone] = await moved_and_alone(cluster, params)
    assert moved.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *(pytest.param(*pin, id=name, marks=pytest.mark.runner("V1")) for name, pin in ONLY_V1_PINS.items()),
        pytest.param({"prompt_logprobs": 1}, "prompt_logprobs", id="prompt_logprobs"),
    ],
)
async def test_pinned_request_stays(cluster: Cluster, options: dict[str, Any], reason: str) -> None:
    """
    A request whose state would not survive stays on its instance while others move, and a counter says why.

    Its output is the same as without any moves.
    """
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=N_OUTPUT, ignore_eos=True, **{"temperature": 0.0, **options})
    [alone] = await cluster.alone(PROMPT, params)
    pinned = cluster.metric("cascadeinfer_pinned_requests_total", reason=reason)
    placed: set[str | None] = set()

    async def watched() -> Any:
        last = None
        async for output in cluster.stream(PROMPT, params, request_id="watched"):
            placed.add(cluster.instance_of("watched"))
            [entry] = [
                e for e in cluster.runtime.snapshot()["requests"]["oldest"] if e["id"].startswith("watched")
            ] or [None]
            assert entry is None or (entry["pinned"], entry["attempts"]) == (reason, 1)
            last = output
        return last.outputs[0]

    moves = cluster.migrations("moved")
    other = cluster.run(random_prompt(40, 4), greedy(N_OUTPUT), hold_at=BEYOND_EDGES)
    output, _ = await asyncio.gather(watched(), other)
    assert cluster.migrations("moved") > moves, "the other one did not move"
    assert placed - {None} == {"0"}
    assert cluster.metric("cascadeinfer_pinned_requests_total", reason=reason) == pinned + 1
    assert output.token_ids == alone.token_ids


async def test_request_for_one_token(cluster: Cluster) -> None:
    """With one token at the edge of a stage, it ends where it began."""
    for n_prompt in (62, 63, 64, 127, 128):
        [output] = await cluster.run(random_prompt(n_prompt, 1), greedy(1))
        assert len(output.token_ids) == 1


async def test_tokens_behind_a_grammar(cluster: Cluster) -> None:
    """With `ignore_eos` a text continues past the end of its grammar, moves there too, and kills no instance."""
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}  # vLLM gives it to llguidance
    restarts = [state.supervisor.restarts for state in cluster.runtime.fleet]
    params = greedy(N_OUTPUT, structured_outputs=StructuredOutputsParams(json=schema))
    [moved], [alone] = await moved_and_alone(cluster, params)
    assert list(moved.token_ids) == list(alone.token_ids)
    assert len(moved.token_ids) == N_OUTPUT
    assert [state.supervisor.restarts for state in cluster.runtime.fleet] == restarts
