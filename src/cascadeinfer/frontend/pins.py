"""
Which requests may not migrate, because their state would not survive the move unchanged.

Found out by experiment on the V1 model runner (`docs/migration.md` has the table): a seeded generator starts again, presence and
frequency penalties count only what was generated since the move, multi-token bad words forget a beginning. The V2 runner should
keep the first two; until that is tested on it, the rule is the same there. A pinned request stays where it is, and a counter says why.
"""

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cascadeinfer.core.events import PinReason


def pin_reason_of(request: EngineCoreRequest, vllm_config: VllmConfig, *, movable: bool) -> PinReason | None:
    """
    Why this request must stay on its instance, or None.

    Args:
        movable: Whether the engine's configuration allows live migration at all.
    """
    reasons = (
        (not movable, PinReason.ENGINE),
        (request.sampling_params is None, PinReason.POOLING),
        (request.resumable, PinReason.STREAMING_INPUT),
        (request.prompt_embeds is not None or request.prompt_token_ids is None, PinReason.PROMPT_EMBEDS),
        (bool(request.mm_features), PinReason.MULTIMODAL),
        (request.lora_request is not None, PinReason.LORA),
    )
    for applies, reason in reasons:
        if applies:
            return reason
    assert request.sampling_params is not None
    return _sampling_pin(request.sampling_params, vllm_config)


def _sampling_pin(sampling: SamplingParams, vllm_config: VllmConfig) -> PinReason | None:
    greedy = sampling.temperature == 0.0
    reasoning = bool(vllm_config.structured_outputs_config.reasoning_parser)
    reasons = (
        (sampling.seed is not None and not greedy, PinReason.SEEDED_SAMPLING),
        (bool(sampling.presence_penalty or sampling.frequency_penalty), PinReason.TOKEN_PENALTIES),
        (
            sampling.prompt_logprobs is not None or bool(sampling.skip_reading_prefix_cache),
            PinReason.PROMPT_LOGPROBS,
        ),
        (bool(sampling.bad_words), PinReason.BAD_WORDS),
        (sampling.structured_outputs is not None and reasoning, PinReason.REASONING_GRAMMAR),
        (sampling.thinking_token_budget is not None, PinReason.CUSTOM_SAMPLING),
    )
    return next((reason for applies, reason in reasons if applies), None)
