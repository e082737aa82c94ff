"""Which requests are pinned, by model runner; `tests/engine` shows that all others survive a move."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from cascadeinfer.core.events import PinReason
from cascadeinfer.engines.vllm.messages import ModelRunner
from cascadeinfer.frontend import pins
from cascadeinfer.frontend.pins import Pins


def config(**changed: Any) -> Any:
    """The part of a `VllmConfig` that the rule reads."""
    fields = {
        "structured_outputs_config": SimpleNamespace(reasoning_parser=""),
        "watermark_config": None,
        "model_config": SimpleNamespace(logits_processors=None),
    }
    return SimpleNamespace(**{**fields, **changed})


def request(params: SamplingParams | None = None, **changed: Any) -> EngineCoreRequest:
    """A plain request."""
    fields = {
        "request_id": "r",
        "prompt_token_ids": [5, 6, 7],
        "mm_features": None,
        "sampling_params": params or SamplingParams(),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**fields, **changed})


def bad_words() -> SamplingParams:
    """Two words that may not occur in sequence."""
    return SamplingParams(bad_words=["hello there"])


@pytest.mark.parametrize(
    ("params", "on_v1"),
    [
        (SamplingParams(temperature=0.5, seed=3), PinReason.SEEDED_SAMPLING),
        (SamplingParams(temperature=0.0, seed=3), None),
        (SamplingParams(presence_penalty=0.5), PinReason.TOKEN_PENALTIES),
        (SamplingParams(frequency_penalty=-0.5), PinReason.TOKEN_PENALTIES),
        (SamplingParams(repetition_penalty=1.5), None),
        (bad_words(), PinReason.BAD_WORDS),
        (SamplingParams(thinking_token_budget=7), PinReason.CUSTOM_SAMPLING),
        (SamplingParams(min_tokens=7, logit_bias={1: 2.0}, top_k=3, min_p=0.1, logprobs=2), None),
    ],
)
def test_v1_pins_what_v2_moves(params: SamplingParams, on_v1: PinReason | None) -> None:
    """State that only the V1 runner loses pins a request on V1 and not on V2."""
    assert Pins(config(), movable=True, model_runner="V1").reason_of(request(params)) is on_v1
    assert Pins(config(), movable=True, model_runner="V2").reason_of(request(params)) is None


REASONING = {"structured_outputs_config": SimpleNamespace(reasoning_parser="qwen3")}
GRAMMAR = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize(
    ("params", "changed", "reason"),
    [
        (SamplingParams(prompt_logprobs=1), {}, PinReason.PROMPT_LOGPROBS),
        (SamplingParams(prompt_logprob_token_ids=[[1, 2]]), {}, PinReason.PROMPT_LOGPROBS),
        (SamplingParams(skip_reading_prefix_cache=True), {}, PinReason.PROMPT_LOGPROBS),
        (GRAMMAR, REASONING, PinReason.REASONING_GRAMMAR),
        (GRAMMAR, {}, None),
        (SamplingParams(), {"model_config": SimpleNamespace(logits_processors=["mine"])}, PinReason.CUSTOM_SAMPLING),
        (SamplingParams(trace_decode_token_ids=[4, 5]), {}, PinReason.CUSTOM_SAMPLING),
        (SamplingParams(), {"watermark_config": object()}, PinReason.CUSTOM_SAMPLING),
        (SamplingParams(watermarking=False), {"watermark_config": object()}, None),
    ],
)
def test_pinned_on_both_runners(
    params: SamplingParams, changed: dict[str, Any], reason: PinReason | None, runner: ModelRunner
) -> None:
    """What neither runner can move is pinned on both."""
    assert Pins(config(**changed), movable=True, model_runner=runner).reason_of(request(params)) is reason


def test_installed_processors_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logits processor from an installed package has state that we do not know, so every request stays."""
    monkeypatch.setattr(pins, "_has_plugged_processors", lambda: True)
    assert Pins(config(), movable=True, model_runner="V2").reason_of(request()) is PinReason.CUSTOM_SAMPLING


@pytest.mark.parametrize(
    ("changed", "movable", "reason"),
    [
        ({}, False, PinReason.ENGINE),
        ({"sampling_params": None}, True, PinReason.POOLING),
        ({"resumable": True}, True, PinReason.STREAMING_INPUT),
        ({"prompt_token_ids": None}, True, PinReason.PROMPT_EMBEDS),
        ({"mm_features": [object()]}, True, PinReason.MULTIMODAL),
        ({"lora_request": object()}, True, PinReason.LORA),
    ],
)
def test_requests_of_other_shapes(changed: dict[str, Any], reason: PinReason, *, movable: bool) -> None:
    """Requests that consist of more than token ids and sampling parameters are pinned."""
    assert Pins(config(), movable=movable, model_runner="V2").reason_of(request(**changed)) is reason
