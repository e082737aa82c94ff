"""
Bringing the grammar of a request that goes on here to where its output so far has taken it.

Token by token, through what the scheduler itself calls after each step, so that the state is the one that the request
had before: a grammar that has ended ignores what follows it, and with a reasoning parser only what follows the
reasoning counts. In bulk some grammars answer otherwise (llguidance ignores tokens after the end one by one, and
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
    Feed the output so far to a grammar that has been compiled and has seen nothing.

    Raises:
        GrammarRefusesError: It does not accept it; the scheduler ends such a request with an error when it happens in a step.
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
