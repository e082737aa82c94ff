"""Requests that are made here and not by vLLM's front end: token ids in, a given number of greedy tokens out."""

import time

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cascadeinfer.engines.protocol import EngineRequest


def make_plain_request(request_id: str, prompt_token_ids: list[int], max_output_tokens: int) -> EngineRequest:
    """A request that generates exactly so many tokens (fewer at the model's longest sequence), whatever they are."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    params.update_from_generation_config({}, None)
    payload = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return EngineRequest(request_id, prompt_token_ids, max_output_tokens, payload)
