"""
The front end's words: its instructions to the connector about a request, kept apart from what clients can send.

A client's fields reach the engine in `SamplingParams.extra_args` (`vllm_xargs` and `kv_transfer_params` of every API
end there), and the front end has no other way to send something with a request. So its words travel under a separate
key, together with a token that the front end creates for each start of an instance and passes to its processes through
their environment, not through the `VllmConfig`, which vLLM logs. The connector opens what carries the token, and
removes everything else of the kind from the request before anybody acts on it
(`docs/decisions/0009-words-under-a-token.md`).

Words that carry the token are checked nevertheless: they decide what the scheduler and NIXL do with memory, and neither
tolerates invalid values.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from typing import Any, Final

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from cascadeinfer.engines.vllm.connector.ticket import PROMPT_TOKENS, PULL_BEFORE, RESERVATION, TransferParams

TOKEN_VARIABLE: Final = "CASCADEINFER_CONNECTOR_TOKEN"  # noqa: S105 - the variable's name
KEY: Final = "cascadeinfer_words"
"""Key of our words in `extra_args`."""
CLIENT_KEY: Final = "kv_transfer_params"
"""Key under which vLLM looks for a client's transfer parameters and passes them to connectors."""
MAX_PORT: Final = 65535


class WordsError(ValueError):
    """Contradictory or invalid words of the front end."""


def new_token() -> str:
    """A token for one start of one instance."""
    return secrets.token_hex(32)


def with_words(sampling_params: SamplingParams, words: TransferParams, token: str) -> SamplingParams:
    """A copy of the parameters that carries these words, and no others."""
    params = sampling_params.clone()
    extra_args = dict(params.extra_args or {})
    extra_args.pop(CLIENT_KEY, None)
    extra_args[KEY] = {"token": token, "words": words}
    params.extra_args = extra_args
    return params


class Desk:
    """Takes what requests carry for the connector out of them."""

    def __init__(self, token: str) -> None:
        """
        Accept words that carry this token.

        Attributes:
            token: For front ends that attach later; must not be logged.
        """
        self.token = token
        self._token = token.encode()

    @classmethod
    def of_this_process(cls) -> "Desk":
        """A desk with the token from the environment, which is then removed; without one, no words are accepted."""
        return cls(os.environ.pop(TOKEN_VARIABLE, "") or new_token())

    def take(self, request: Request) -> TransferParams | None:
        """The front end's words, or None. Afterwards the request carries neither these nor a client's."""
        request.kv_transfer_params = None
        sampling_params = request.sampling_params
        if sampling_params is None or not isinstance(sampling_params.extra_args, dict):
            return None
        sealed = sampling_params.extra_args.pop(KEY, None)
        sampling_params.extra_args.pop(CLIENT_KEY, None)
        if not isinstance(sealed, dict) or not self._carries_token(sealed):
            return None
        words = sealed.get("words")
        return words if isinstance(words, dict) else {}

    def _carries_token(self, sealed: Mapping[str, Any]) -> bool:
        token = sealed.get("token")
        return isinstance(token, str) and hmac.compare_digest(token.encode(errors="replace"), self._token)


def can_go_on_elsewhere(request: Request) -> bool:
    """Whether its prompt is complete and can be split from its output again."""
    return request.prompt_token_ids is not None and request.prompt_is_token_ids is None and not request.resumable


def check_words(words: TransferParams, request: Request, block_size: int) -> None:
    """
    Check that a request can continue as these words say.

    Raises:
        WordsError: It cannot; the message names the wrong word.
    """
    if request.prompt_token_ids is None or not can_go_on_elsewhere(request):
        raise WordsError("only a prompt of token ids that is complete can go on elsewhere")
    _whole(words, PROMPT_TOKENS, 1, len(request.prompt_token_ids))
    if not isinstance(words.get(RESERVATION), str | None):
        raise WordsError(f"{RESERVATION} is no name")
    if words.get("do_remote_decode"):
        raise WordsError("nobody is to pull a request that has just come")
    if words.get("do_remote_prefill"):
        check_ticket(words, block_size)


def check_ticket(words: TransferParams, block_size: int) -> None:
    """
    Check that these words name blocks that can be read.

    Raises:
        WordsError: They do not; the message names the wrong word.
    """
    for name in ("remote_engine_id", "remote_request_id", "remote_host"):
        if not isinstance(words.get(name), str):
            raise WordsError(f"{name} is no name")
    _whole(words, "remote_port", 1, MAX_PORT)
    for name in ("tp_size", "dcp_size", "pp_size"):
        _whole({"tp_size": None, "dcp_size": 1, "pp_size": 1, **words}, name, 1)
    n_tokens = _whole(words, "remote_num_tokens", 1)
    groups = words.get("remote_block_ids")
    if not isinstance(groups, list | tuple) or len(groups) != 1 or not isinstance(groups[0], list | tuple):
        raise WordsError("remote_block_ids are not those of one group")
    if any(type(block) is not int or block < 0 for block in groups[0]) or len(groups[0]) != -(-n_tokens // block_size):
        raise WordsError("remote_block_ids are not those of remote_num_tokens")
    if not isinstance(words.get("remote_blocks_expiry_time"), int | float | None):
        raise WordsError("remote_blocks_expiry_time is no time")
    before_s = words.get(PULL_BEFORE)
    if not isinstance(before_s, int | float | None) or before_s != before_s:  # noqa: PLR0124 - true of NaN alone
        raise WordsError(f"{PULL_BEFORE} is no time")


def _whole(words: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int:
    """The whole number under this name, within these bounds."""
    value = words.get(name)
    if type(value) is not int or value < low or (high is not None and value > high):
        raise WordsError(f"{name} is {value!r}, not a whole number from {low} to {high if high is not None else 'any'}")
    return value
