"""
A request's sampling parameters as vLLM has understood them: the last check before the engine, whichever API it came
through.
"""

import re
from typing import Any, Final

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.serial_utils import MsgpackEncoder

from cascadeinfer.frontend.contents.limits import ContentLimits, SchemaLimits
from cascadeinfer.frontend.contents.schemas import SchemaRefusedError, check_structured_output
from cascadeinfer.frontend.contents.words import FORBIDDEN, WHY_REFUSED
from cascadeinfer.frontend.door.door import ID_CHARACTERS, PLAIN_ID

UNSENDABLE: Final = (
    "a number in it is beyond 64 bits, or a text in it is not valid Unicode: it cannot be sent to an engine"
)
REQUEST_ID: Final = re.compile(f"{ID_CHARACTERS}{{1,256}}")
"""Limit of `X-Request-Id`, plus room for what vLLM puts around it."""
BAD_ID: Final = f"request_id {PLAIN_ID}"
_ENCODER: Final = MsgpackEncoder()
KINDS: Final = ("json", "regex", "choice", "grammar", "structural_tag")


class ContentRefusedError(Exception):
    """A request contains something that is not allowed; the message is for its client."""


def checked_params(params: Any, limits: ContentLimits) -> Any:
    """
    The parameters, without forbidden words where those are ignored.

    Raises:
        ContentRefusedError: A word is forbidden, or a structured output too large.
    """
    if isinstance(params, SamplingParams):
        params.extra_args = _without_words(params.extra_args, limits)
        _check_structured_output(params, limits.schemas)
    elif isinstance(params, PoolingParams):
        params.extra_kwargs = _without_words(params.extra_kwargs, limits)
    return params


def check_sendable(request_id: str, params: Any) -> None:
    """
    Check everything from a client that goes to an engine, except its prompt, whose ids are in the vocabulary.

    Raises:
        ContentRefusedError: Some of it fits in no message, or its id, which a body may choose, in no log.
    """
    if not REQUEST_ID.fullmatch(request_id):
        raise ContentRefusedError(BAD_ID)
    try:
        _ENCODER.encode((request_id, params))
    except (OverflowError, UnicodeEncodeError) as error:
        raise ContentRefusedError(UNSENDABLE) from error


def _without_words(words: dict[str, Any] | None, limits: ContentLimits) -> dict[str, Any] | None:
    found = next((word for word in FORBIDDEN if words and word in words), None)
    if words is None or found is None:
        return words
    if not limits.ignores_words:
        raise ContentRefusedError(f"{found} {WHY_REFUSED}")
    return {name: value for name, value in words.items() if name not in FORBIDDEN}


def _check_structured_output(params: SamplingParams, limits: SchemaLimits) -> None:
    structured = params.structured_outputs
    if structured is None:
        return
    for kind in KINDS:
        if (value := getattr(structured, kind)) is not None:
            try:
                check_structured_output(kind, value, limits)
            except SchemaRefusedError as refused:
                raise ContentRefusedError(f"the structured output ({kind}) is refused: {refused}") from refused
