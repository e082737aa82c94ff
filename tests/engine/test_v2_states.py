"""
On vLLM's V2 model runner, a moved request has at every position the state it would have on one instance.

The test compares the runner's own request states (see `v2_states.py`), not only the texts. A count that is off by one,
a seed that starts afresh or a prompt that has grown shows, even where the tiny model's text happens to be the same.
Mutations show that the comparison detects such faults.
"""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer
from zoo import BLOCK, END_THINK_ID, EOS_ID, PAIRS, THINK_ID, Attempt, Zoo, random_prompt

from cascadeinfer.engines.vllm.connector.ticket import VllmTicket
from support.v2_states import PREFIX, Recording, State

pytestmark = [pytest.mark.engine, pytest.mark.runner("V2"), pytest.mark.asyncio(loop_scope="session")]

N_OUTPUT = 44
PROMPT = [*[token for token in random_prompt(50, 5) if not THINK_ID <= token <= END_THINK_ID][:40], THINK_ID]
"""It starts to think, which matters only to a thinking budget."""
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.3, "seed": 1234},
    "seeded top_p and top_k": {"temperature": 0.9, "seed": 7, "top_p": 0.8, "top_k": 50},
    "seeded min_p": {"temperature": 1.0, "seed": 99, "min_p": 0.05},
    "presence and frequency": {"temperature": 1.0, "seed": 5, "presence_penalty": 1.1, "frequency_penalty": 0.7},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.4},
    "min_tokens": {"temperature": 1.5, "seed": 3, "min_tokens": 30, "stop_token_ids": list(range(3, 90))},
    "logit_bias": {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -100.0}},
    "bad_words": {"temperature": 0.0, "bad_words": True},
    "thinking": {"temperature": 0.7, "seed": 21, "thinking_token_budget": 20},
    "grammar": {"temperature": 0.8, "seed": 17, "regex": r"([a-f]{3}-[0-9]{2},){60}"},
}
PULLED_IN_CI = {"seeded top_p and top_k", "presence and frequency", "grammar"}
RECOMPUTED_IN_CI = {"presence and frequency", "grammar"}
PREFIX_OF_GRAMMAR = re.compile(r"([a-f]{3}-[0-9]{2},)*([a-f]{0,3}|[a-f]{3}-[0-9]{0,2})")
"""
What output within the regular expression looks like. One kernel, the mask's, is replaced where there is no GPU (see
`v2_runner.py`), so the mask is checked, too.
"""
CUTS = (7, BLOCK - len(PROMPT) % BLOCK, BLOCK - len(PROMPT) % BLOCK + 1)
"""Output tokens when the cut is requested: within a block, and around a block's end."""


@pytest.fixture(scope="module")
def recording(states_folder: Path) -> Recording:
    """What the instances' processes record."""
    return Recording(states_folder)


@pytest_asyncio.fixture(loop_scope="session")
async def alone(zoo: Zoo) -> AsyncIterator[Callable[[str], Any]]:
    """A case's run on one instance, once per test."""
    instance = next(iter(zoo.instances.values()))

    async def run(case: str) -> Attempt:
        return await (
            await zoo.start(instance, PROMPT, await params(zoo, case), request_id=_fresh("alone"))
        ).until_end()

    yield run


_numbers = iter(range(1_000_000))


def _fresh(name: str) -> str:
    return f"{PREFIX}{name}{next(_numbers)}"


async def params(zoo: Zoo, case: str) -> Any:
    """A case's sampling parameters; bad words are pairs of tokens that occur in the greedy text."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    options = dict(CASES[case])
    wanted = options.pop("bad_words", False)
    if (regex := options.pop("regex", None)) is not None:
        options["structured_outputs"] = StructuredOutputsParams(regex=regex)
        options["structured_outputs"]._backend = "xgrammar"  # the front end's choice
    found = SamplingParams(max_tokens=N_OUTPUT, ignore_eos=case != "min_tokens", **options)
    found.update_from_generation_config({}, EOS_ID)
    if wanted:
        text = (await zoo.run(next(iter(zoo.instances.values())), PROMPT, await params(zoo, "greedy"))).output
        found._bad_words_token_ids = [[text[at], text[at + 1]] for at in (5, 9, 14, 20, 30)] + [text[33:36]]
    return found


def differences(recording: Recording, case: str, moved: Attempt, alone: Attempt) -> set[str]:
    """
    What differs: `text`, or fields of the state at some position.

    V2 draws a seed for each request that has none; such seeds are not compared.
    """
    compared = {field.name for field in fields(State)} - ({"seed"} if "seed" not in CASES[case] else set())
    found = set() if moved.output == alone.output else {"text"}
    expected = dict(recording.rows(alone.request.request_id))
    rows = recording.rows(moved.request.request_id)
    assert expected
    assert {position for position, _ in rows} >= expected.keys(), "a position was not recorded"
    for position, state in rows:
        if position in expected:  # a step may have been running when the request ended
            found |= {name for name in compared if getattr(state, name) != getattr(expected[position], name)}
    return found


async def move(
    zoo: Zoo, case: str, pair: tuple[str, str], at: int, *, recompute: bool = False, **hooks: Any
) -> Attempt:
    """A case's run with one move; retried, since a request may end before it is cut."""
    here, there = (zoo.instances[name] for name in pair)
    for _ in range(20):
        attempt = await zoo.start(here, PROMPT, await params(zoo, case), request_id=_fresh("moved"))
        await attempt.until_output(at)
        moved = await zoo.move(attempt, there, recompute=recompute, **hooks)
        await moved.until_end()
        if moved is not attempt:
            return moved
    raise AssertionError("never cut in time")


@pytest.mark.parametrize(
    ("case", "pair"),
    [
        pytest.param(case, pair, marks=pytest.mark.quick_v2)
        if case in PULLED_IN_CI and pair == PAIRS[0]
        else (case, pair)
        for case in CASES
        for pair in PAIRS
    ],
)
async def test_states_after_a_pull(
    zoo: Zoo, recording: Recording, alone: Any, case: str, pair: tuple[str, str]
) -> None:
    """With KV pulls, cut within a block and around its end, every state equals that of an unmoved run."""
    expected = await alone(case)
    if "min_tokens" not in case:
        assert len(expected.output) == N_OUTPUT
    for at in CUTS:
        assert differences(recording, case, await move(zoo, case, pair, at), expected) == set()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick_v2) if case in RECOMPUTED_IN_CI else case for case in CASES]
)
async def test_states_after_a_recomputation(zoo: Zoo, recording: Recording, alone: Any, case: str) -> None:
    """Recomputed at the target, with other requests in the batch, every state is the same too."""
    expected = await alone(case)
    other = await zoo.start(zoo.instances[PAIRS[0][1]], random_prompt(60, 8), await params(zoo, "greedy"))
    assert differences(recording, case, await move(zoo, case, PAIRS[0], 12, recompute=True), expected) == set()
    await other.until_end()


@pytest.mark.quick_v2
async def test_grammar_is_obeyed(zoo: Zoo, tiny_model: Path, alone: Any) -> None:
    """Alone and after a move, pulled or recomputed, the text is the beginning of one that the grammar allows."""
    moved = [await move(zoo, "grammar", PAIRS[0], 12, recompute=recompute) for recompute in (False, True)]
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    texts = {tokenizer.decode(attempt.output) for attempt in [await alone("grammar"), *moved]}
    assert len(texts) == 1
    assert PREFIX_OF_GRAMMAR.fullmatch(texts.pop())


async def mutate(zoo: Zoo, pair: tuple[str, str], name: str) -> None:
    """Switch a fault on at the pair's target; an empty name switches it off."""
    await zoo.instances[pair[1]].utility("call_utility_async", "cascade_test_mutate", name)


@pytest.mark.parametrize(
    ("mutation", "case", "seen"),
    [
        pytest.param("v1_terms", "presence and frequency", {"output_counts"}, marks=pytest.mark.quick_v2),
        ("v1_terms", "min_tokens", {"prompt_tokens"}),
        pytest.param(
            "no_split", "presence and frequency", {"prompt_tokens", "output_counts"}, marks=pytest.mark.quick_v2
        ),
        ("no_split", "min_tokens", {"prompt_tokens", "min_total_tokens"}),
    ],
)
async def test_comparison_sees_a_fault(
    zoo: Zoo, recording: Recording, alone: Any, mutation: str, case: str, seen: set[str]
) -> None:
    """What V1 needs is wrong on V2, and so is passing output tokens as prompt: the comparison finds each fault."""
    expected = await alone(case)
    await mutate(zoo, PAIRS[0], mutation)
    try:
        moved = await move(zoo, case, PAIRS[0], 12)
    finally:
        await mutate(zoo, PAIRS[0], "")
    assert seen <= differences(recording, case, moved, expected)


@pytest.mark.quick_v2
async def test_comparison_sees_wrong_blocks(zoo: Zoo, recording: Recording, alone: Any) -> None:
    """If blocks are pulled in the wrong order, the text differs."""
    expected = await alone("greedy")
    here, there = (zoo.instances[name] for name in PAIRS[0])
    attempt = await zoo.start(here, PROMPT, await params(zoo, "greedy"), request_id=_fresh("moved"))
    await attempt.until_output(12)
    assert await zoo.cut(attempt)
    assert isinstance(attempt.ticket, VllmTicket)
    [blocks] = attempt.ticket.params["remote_block_ids"]
    assert len(blocks) > 1
    rotated = VllmTicket({**attempt.ticket.params, "remote_block_ids": [[*blocks[1:], blocks[0]]]})
    moved = await (await zoo.resume(attempt, there, ticket=rotated)).until_end()
    assert "text" in differences(recording, "greedy", moved, expected)
