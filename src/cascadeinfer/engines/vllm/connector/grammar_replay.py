"""
Advance the grammar of a resumed request to where its output so far has taken it.

This goes token by token through what the scheduler itself calls after each step, so that the state equals the one the
request had before: a grammar that has ended ignores what follows it, and with a reasoning parser only what follows the
reasoning counts. In bulk some grammars answer differently (llguidance ignores tokens after the end one by one, but
refuses them in one list).
"""

from types import SimpleNamespace
from typing import Any, cast

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager


class GrammarRefusesError(Exception):
    """A grammar does not accept the output that was made with it."""


def replay_grammar(manager: StructuredOutputManager, request: Request) -> None:
    """
    Feed the output so far to a freshly compiled grammar.

    Raises:
        GrammarRefusesError: The grammar does not accept it. When this happens in a step, the scheduler ends the request
            with an error.
    """
    seen: list[int] = list(request.prompt_token_ids or ())
    before: Any = SimpleNamespace(  # the request as it was after each of its steps, as far as the manager looks
        request_id=request.request_id,
        use_structured_output=request.use_structured_output,
        structured_output_request=request.structured_output_request,
        prompt_token_ids=request.prompt_token_ids,
        all_token_ids=seen,
    )
    for position, token_id in enumerate(request.output_token_ids):
        seen.append(token_id)
        if not manager.accept_tokens(cast(Request, before), [token_id]):
            raise GrammarRefusesError(f"output token {position}, id {token_id}, does not fit the grammar")
