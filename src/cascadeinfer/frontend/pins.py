"""
Which requests may not migrate because a move could change their output.

What survives a migration depends on the model runner (`docs/migration.md` has the table, with the test for each cell).
V1 restarts a seeded generator, counts penalties from the move on and forgets the beginning of a bad word. V2 derives
noise from seed and position and rebuilds its counts from the token ids, so none of these pins a request there. A
counter records why requests are pinned.
"""

from importlib.metadata import entry_points

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from cascadeinfer.core.events import PinReason
from cascadeinfer.engines.vllm.messages import ModelRunner


class Pins:
    """The rule for one set of engines; their configuration is looked at once, not for each request."""

    def __init__(self, vllm_config: VllmConfig, *, movable: bool, model_runner: ModelRunner) -> None:
        """
        Args:
            vllm_config: The engines' configuration.
            movable: Whether it allows live migration at all.
            model_runner: The engines', as they report it: this process may have another environment.
        """
        self._movable = movable
        self._v1_runner = model_runner == "V1"
        self._reasoning = bool(vllm_config.structured_outputs_config.reasoning_parser)
        self._watermarks = vllm_config.watermark_config is not None
        self._custom_processors = bool(vllm_config.model_config.logits_processors) or _has_plugged_processors()

    def reason_of(self, request: EngineCoreRequest) -> PinReason | None:
        """Why this request, as made by vLLM's front end, must stay on its instance, or None."""
        reasons = (
            (not self._movable, PinReason.ENGINE),
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
        sampling = request.sampling_params
        if (reason_everywhere := self._sampling_pin(sampling)) is not None:
            return reason_everywhere
        return _v1_pin(sampling) if self._v1_runner else None

    def _sampling_pin(self, sampling: SamplingParams) -> PinReason | None:
        """Sampling features that no runner can migrate."""
        watermarked = self._watermarks and sampling.watermarking is not False
        reasons = (
            (
                sampling.prompt_logprobs is not None
                or sampling.prompt_logprob_token_ids is not None
                or bool(sampling.skip_reading_prefix_cache),
                PinReason.PROMPT_LOGPROBS,
            ),
            (sampling.structured_outputs is not None and self._reasoning, PinReason.REASONING_GRAMMAR),
            (self._custom_processors, PinReason.CUSTOM_SAMPLING),
            (watermarked or sampling.trace_decode_token_ids is not None, PinReason.CUSTOM_SAMPLING),
        )
        return next((reason for applies, reason in reasons if applies), None)


def _v1_pin(sampling: SamplingParams) -> PinReason | None:
    """Sampling state that the V1 runner loses in a migration."""
    reasons = (
        (sampling.seed is not None and sampling.temperature != 0.0, PinReason.SEEDED_SAMPLING),
        (bool(sampling.presence_penalty or sampling.frequency_penalty), PinReason.TOKEN_PENALTIES),
        (bool(sampling.bad_words), PinReason.BAD_WORDS),
        (sampling.thinking_token_budget is not None, PinReason.CUSTOM_SAMPLING),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _has_plugged_processors() -> bool:
    """Whether an installed package adds logits processors, whose state is unknown here."""
    return bool(entry_points(group=LOGITSPROCS_GROUP))
