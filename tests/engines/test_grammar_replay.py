"""
A request with a grammar continues elsewhere with its grammar in the same state, for every backend, even after the
grammar's end.
"""

import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scheduler_bed import EOS_ID, SchedulerBed, greedy, make_bed
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request

from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.connector.grammar_replay import GrammarRefusesError, replay_grammar

PROMPT = list(range(20, 50))
N_STEPS = 60
MULTIPLES = {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "guidance: multiples": ("guidance", {"json": MULTIPLES}),
    "guidance: object": ("guidance", {"json": COLOUR}),
    "guidance: regex": ("guidance", {"regex": "[a-c]{4}-[0-9]"}),
    "xgrammar: object": ("xgrammar", {"json": COLOUR}),
    "xgrammar: regex": ("xgrammar", {"regex": "[a-c]{4}-[0-9]"}),
    "xgrammar: grammar": ("xgrammar", {"grammar": 'root ::= "yes" | "no"'}),
    "outlines: regex": ("outlines", {"regex": "[a-c]{4}-[0-9]"}),
    "outlines: object": ("outlines", {"json": COLOUR}),
}
ENFORCER_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lm-format-enforcer: regex": ("lm-format-enforcer", {"regex": "[a-c]{4}-[0-9]"}),
    "lm-format-enforcer: object": ("lm-format-enforcer", {"json": COLOUR}),
}


def enforcer_works() -> bool:
    """Whether the installed lm-format-enforcer fits this vLLM, which otherwise refuses every request that wants it."""
    try:
        importlib.import_module("lmformatenforcer.integrations.vllm")
    except ImportError:
        return False
    return True


needs_enforcer = pytest.mark.skipif(not enforcer_works(), reason="lm-format-enforcer does not fit this vLLM")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def params_of(case: str) -> Any:
    """Parameters as the front end sends them once it has chosen the backend."""
    backend, options = (CASES | ENFORCER_CASES)[case]
    structured = StructuredOutputsParams(**options)
    structured._backend = backend
    return greedy(64, structured_outputs=structured)


def state_of(bed: SchedulerBed, request: Request) -> tuple[bool, list[int]]:
    """Whether the grammar has ended, and which tokens it allows next."""
    structured = request.structured_output_request
    assert structured is not None
    grammar: Any = structured.grammar
    if grammar.is_terminated():
        return True, []
    assert bed.manager.backend is not None
    mask = bed.manager.backend.allocate_token_bitmask(1)
    grammar.fill_bitmask(mask, 0)
    bits = mask[0].view(torch.uint8).tolist()
    return False, [index for index in range(8 * len(bits)) if bits[index // 8] >> index % 8 & 1]


def some_token(tokenizer: Any, rng: random.Random, allowed: list[int]) -> int:
    """
    An allowed token: the end as soon as it is allowed, otherwise no white space if possible, since JSON may have any
    amount.
    """
    plain = [token_id for token_id in allowed if tokenizer.decode([token_id]).strip()]
    return EOS_ID if EOS_ID in allowed else rng.choice(plain or allowed)


def decode(bed: SchedulerBed, request: Request, n_steps: int) -> list[tuple[bool, list[int]]]:
    """
    Decode as the scheduler does: allowed tokens until the grammar ends, then any. Returns the states before each step
    and after the last.
    """
    rng = random.Random(request.request_id)
    states = [state_of(bed, request)]
    for _ in range(n_steps):
        ended, allowed = states[-1]
        token_id = rng.randrange(3, 200) if ended or not allowed else some_token(bed.manager.tokenizer, rng, allowed)
        request.append_output_token_ids(token_id)
        if not bed.manager.accept_tokens(request, [token_id]):  # the scheduler would end it here
            request._output_token_ids.pop()
            request._all_token_ids.pop()
            break
        states.append(state_of(bed, request))
    return states


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=needs_enforcer) for case in ENFORCER_CASES)])
def test_a_grammar_goes_on_where_it_was(model: Path, case: str) -> None:
    """Wherever a request moves, even after its grammar's end, it keeps the grammar's state."""
    bed = make_bed(model)
    alone = bed.add("alone", PROMPT, params_of(case))
    states = decode(bed, alone, N_STEPS)
    output = list(alone.output_token_ids)
    assert len(output) == len(states) - 1
    assert EOS_ID in output, "it never came to the grammar's end"
    if not case.startswith("lm-format"):  # which accepts nothing behind the end: its requests end there, with an error
        assert len(output) == N_STEPS
    for n_before in range(1, len(output) + 1):
        words = bed.words(params_of(case), cascade_prompt_tokens=len(PROMPT))
        request = bed.add(f"moved {n_before}", PROMPT + output[:n_before], words)
        bed.scheduler.schedule()
        assert request.request_id not in bed.side._failures
        assert state_of(bed, request) == states[n_before], f"after {n_before} tokens"
        bed.scheduler.finish_requests(request.request_id, request.status.FINISHED_ABORTED)


def test_why_not_in_bulk(model: Path) -> None:
    """The llguidance backend rejects in bulk what it accepts one by one; if that changes, replay could be simpler."""
    bed = make_bed(model)
    alone = bed.add("alone", PROMPT, params_of("guidance: multiples"))
    decode(bed, alone, N_STEPS)
    fresh = bed.add("fresh", PROMPT, params_of("guidance: multiples"))
    assert fresh.structured_output_request is not None
    grammar: Any = fresh.structured_output_request.grammar
    output = list(alone.output_token_ids)
    assert not grammar.accept_tokens("fresh", [*output[: output.index(EOS_ID)], 7, 8])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_output_that_does_not_fit_ends_its_request(model: Path, asynchronous: bool) -> None:
    """
    The request ends with an error, as it would have in the step that produced the token. Others continue, and nothing
    is left over.
    """
    bed = make_bed(model, asynchronous=asynchronous)
    bed.add("bad", [*PROMPT, 7, 8, 9], bed.words(params_of("xgrammar: object"), cascade_prompt_tokens=len(PROMPT)))
    bed.add("good", PROMPT, greedy(5))
    bed.steps(8)
    assert bed.failed("bad")
    assert bed.tokens["good"] == [7] * 5
    assert bed.holds_nothing()


def test_which_token_did_not_fit(model: Path) -> None:
    """The log names it."""
    bed = make_bed(model)
    request = bed.add("a", PROMPT, params_of("xgrammar: regex"))
    request.append_output_token_ids([7, 8])
    with pytest.raises(GrammarRefusesError, match="output token 0, id 7,"):
        replay_grammar(bed.manager, request)
