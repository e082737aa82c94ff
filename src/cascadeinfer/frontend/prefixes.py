"""
Hashes of prompt prefixes, by which a policy recognises prompts with a common prefix (`core/placing/affinity.py`,
`prefix_aware.py`).

They are coarser and cheaper than vLLM's block hashes, which its engines compute for themselves: a common prefix shorter
than `PREFIX_BLOCK_TOKENS` is not worth a detour. Each hash covers all blocks before it, so equal hashes mean equal
prefixes; a collision costs one detour and nothing else. The hashes are meaningless outside this process.
"""

from typing import Final

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest

PREFIX_BLOCK_TOKENS: Final = 128
"""Tokens per hash. 128,000 tokens give 1,000 hashes, in about a millisecond."""


def prefix_hashes_of(request: EngineCoreRequest, vllm_config: VllmConfig) -> tuple[int, ...]:
    """
    One hash per block of the prompt; the last block may be shorter. Prompts that vLLM's cache keeps apart differ from
    the first hash on.

    Empty if nothing can be shared: without prefix caching, for prompts that are more than token ids, for requests that
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
