"""Requests made here rather than by vLLM's front end, for profiles, benchmarks and tests: token ids in and out."""

import time

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cascadeinfer.engines.protocol import EngineRequest


def make_plain_request(request_id: str, prompt_token_ids: list[int], max_output_tokens: int) -> EngineRequest:
    """A request that generates exactly this many tokens (fewer at the model's longest sequence), whatever they are."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    params.update_from_generation_config({}, None)
    return request_with(request_id, prompt_token_ids, params)


def request_with(request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> EngineRequest:
    """A request of text with these sampling parameters, `max_tokens` among them."""
    assert params.max_tokens is not None
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
    return EngineRequest(request_id, prompt_token_ids, params.max_tokens, payload)
