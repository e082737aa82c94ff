"""
Hashes of a prompt's beginnings, by which a policy sees that two prompts start alike (`core/placing/affinity.py`,
`prefix_aware.py`).

They are not vLLM's block hashes, which its engines compute for themselves, but coarser and cheaper ones: a shared
beginning of less than `PREFIX_BLOCK_TOKENS` is not worth a detour. Each covers all blocks before it, so equal hashes
mean equal beginnings, up to accidents that cost one detour and nothing else. They say nothing outside this process.
"""

from typing import Final

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest

PREFIX_BLOCK_TOKENS: Final = 128
"""Tokens per hash. 128,000 tokens give 1,000 hashes, in about a millisecond."""


def prefix_hashes_of(request: EngineCoreRequest, vllm_config: VllmConfig) -> tuple[int, ...]:
    """
    One hash per block of the prompt, the last of which may be shorter; what vLLM keeps apart in its cache differs from
    the first on.

    Empty where nothing is shared: without prefix caching, for prompts that are more than token ids, for requests that
    may not read the cache.
    """
    tokens = request.prompt_token_ids
    sampling = request.sampling_params
    reads_cache = (
        bool(vllm_config.cache_config.enable_prefix_caching)
        and sampling is not None
        and sampling.prompt_logprobs is None
        and not sampling.skip_reading_prefix_cache
    )
    if not tokens or not reads_cache or request.mm_features or request.prompt_embeds is not None:
        return ()
    lora = request.lora_request
    value = hash((request.cache_salt or "", "" if lora is None else lora.lora_name))
    hashes = []
    for start in range(0, len(tokens), PREFIX_BLOCK_TOKENS):
        value = hash((value, *tokens[start : start + PREFIX_BLOCK_TOKENS]))
        hashes.append(value)
    return tuple(hashes)
