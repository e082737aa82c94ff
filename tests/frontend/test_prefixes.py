"""Hashes of prompt prefixes, as the front end computes them."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cascadeinfer.frontend.prefixes import PREFIX_BLOCK_TOKENS, prefix_hashes_of

N = PREFIX_BLOCK_TOKENS


def config(*, caches: bool = True) -> Any:
    """The parts of vLLM's configuration that are read."""
    return SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=caches))


def request(tokens: list[int] | None, **changes: Any) -> EngineCoreRequest:
    """A request with this prompt."""
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": tokens,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=8),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**fields, **changes})


def test_equal_as_far_as_the_prompts_are() -> None:
    """One hash per block, the last for the remainder; two prompts' hashes agree exactly as far as the prompts do."""
    tokens = list(range(3 * N + 5))
    hashes = prefix_hashes_of(request(tokens), config())
    assert len(hashes) == len(set(hashes)) == 4
    assert prefix_hashes_of(request(tokens[: 2 * N]), config()) == hashes[:2]
    other = [*tokens[:N], -1, *tokens[N + 1 :]]
    assert [a == b for a, b in zip(hashes, prefix_hashes_of(request(other), config()), strict=True)] == [
        True,
        False,
        False,
        False,
    ]


def test_what_the_engines_keep_apart() -> None:
    """A cache salt or an adapter changes every hash."""
    tokens = list(range(2 * N))
    lora: Any = SimpleNamespace(lora_name="adapter")
    variants = [{}, {"cache_salt": "s"}, {"cache_salt": "t"}, {"lora_request": lora}]
    found = [prefix_hashes_of(request(tokens, **changes), config()) for changes in variants]
    assert len({value for hashes in found for value in hashes}) == 2 * len(variants)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": None},
        {"prompt_token_ids": []},
        {"mm_features": [object()]},
        {"prompt_embeds": object()},
        {"sampling_params": None},
        {"sampling_params": SamplingParams(prompt_logprobs=1)},
        {"sampling_params": SamplingParams(skip_reading_prefix_cache=True)},
    ],
)
def test_none_where_nothing_is_shared(changes: dict[str, Any]) -> None:
    """Such a request reads no cache that a policy could know of."""
    assert prefix_hashes_of(request(tokens=[1, 2, 3], **changes), config()) == ()


def test_none_without_prefix_caching() -> None:
    """Engines without a prefix cache have nothing to return to."""
    assert prefix_hashes_of(request([1, 2, 3]), config(caches=False)) == ()
