"""
Part `moves`: whether requests that move between two instances keep their text, by what their sampling depends on.

Two instances of the tiny model, on a GPU both on the same one. Each case runs alone on either instance, then with two
moves (there and back), once with the KV cache pulled and once recomputed. A row says whether the text is the same, and
where it begins to differ. A case that differs although it ran without a move says nothing about moves: its text depends
on the batch. The server does not move what its rules pin (`pinned`), whatever is measured here.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from part_options import options_of
from row_log import RowLog

from cascadeinfer.doctor.texts import first_difference
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.plain_request import request_with
from cascadeinfer.frontend.pins import Pins

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from cascadeinfer.engines.vllm.instance import VllmInstance

    Pair = tuple[VllmInstance, VllmInstance]

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "engine"))

from zoo import BLOCK, KV_BLOCKS, MAX_MODEL_LEN, Attempt, Zoo, random_prompt

PROMPT: Final = random_prompt(50, 5)
TOKENS: Final = 64
MOVES_AFTER: Final = (9, 21)
"""Tokens after which it moves, from one instance and from the other."""
MEMORY_SHARE: Final = 0.2
"""Of a GPU, for each instance."""
CASES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.3, "seed": 1234},
    "seeded, top_p and top_k": {"temperature": 0.9, "seed": 7, "top_p": 0.8, "top_k": 50},
    "presence and frequency penalty": {"temperature": 0.0, "presence_penalty": 1.1, "frequency_penalty": 0.7},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "seeded with penalties": {"temperature": 1.0, "seed": 5, "presence_penalty": 1.1, "frequency_penalty": 0.7},
    "min_tokens": {"temperature": 0.0, "min_tokens": 30, "stop_token_ids": list(range(3, 90))},
    "logit_bias": {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -100.0}},
    "grammar": {"temperature": 0.0, "grammar": "[a-d ]{200,220}"},
}


def params(case: str) -> "SamplingParams":
    """A case's sampling parameters, as the front end would send them."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams  # noqa: PLC0415 - imports vLLM

    options = dict(CASES[case])
    pattern = options.pop("grammar", None)
    if pattern is not None:
        grammar = StructuredOutputsParams(regex=pattern)
        grammar._backend = "xgrammar"  # noqa: SLF001 - vLLM's front end, which is not used here, chooses it
        options["structured_outputs"] = grammar
    found = SamplingParams(max_tokens=TOKENS, ignore_eos="stop_token_ids" not in options, **options)
    found.update_from_generation_config({}, 2)
    return found


async def moved(zoo: Zoo, pair: "Pair", case: str, *, recompute: bool) -> tuple[Attempt, int]:
    """A run with its moves; returns the last attempt and the number of moves that took place."""
    here, there = pair
    attempt = await zoo.start(here, PROMPT, params(case))
    moves = 0
    for after in MOVES_AFTER:
        # A first move may have come late: the attempt must have sent something itself, or it still waits for its turn.
        await attempt.until(lambda a, after=after: bool(a.token_ids) and len(a.output) >= after)
        new = await zoo.move(attempt, there, recompute=recompute)
        if new is attempt:
            break  # it ended first
        attempt, moves, here, there = new, moves + 1, there, here
    return await attempt.until_end(), moves


async def measure(zoo: Zoo, pair: "Pair", log: RowLog) -> int:
    """
    All cases that are missing.

    Args:
        zoo: Connected instances.
        pair: Two of them.
        log: Of the rows.

    Returns:
        How many cases the engine refused.
    """
    one, other = pair
    config = one.config
    runner = one.hello.model_runner
    pins = Pins(config, movable=True, model_runner=runner)
    refused = 0
    for case in CASES:
        alone = (await zoo.run(one, PROMPT, params(case))).output
        if not alone:
            sys.stderr.write(f"{case}: the engine refused it\n")
            refused += 1
            continue
        pinned = pins.reason_of(request_with("pin", PROMPT, params(case)).payload)
        for way in ("no move", "pull", "recompute"):
            key = f"{case}, {way}"
            if log.has(key):
                continue
            if way == "no move":
                attempt, moves = await zoo.run(other, PROMPT, params(case)), 0
            else:
                attempt, moves = await moved(zoo, pair, case, recompute=way == "recompute")
            at = first_difference(alone, attempt.output)
            log.add(
                key, case=case, way=way, moves=moves, tokens=len(alone), same=at is None, differs_at=at,
                pinned=None if pinned is None else pinned.value, runner=runner,
                asynchronous=bool(config.scheduler_config.async_scheduling),
            )  # fmt: skip
            await zoo.settled()
    return refused


async def run_all(options: argparse.Namespace, folder: Path, log: RowLog) -> int:
    """Start two instances, measure, stop them; returns how many cases were refused."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - imports vLLM

    from cascadeinfer.cluster.runtime_folder import runtime_folder  # noqa: PLC0415 - imports vLLM
    from cascadeinfer.engines.vllm.configuration import KvTransferSettings  # noqa: PLC0415 - imports vLLM
    from cascadeinfer.engines.vllm.launch import make_factories  # noqa: PLC0415 - imports vLLM

    engine_args = AsyncEngineArgs(
        model=str(make_tiny_llama(folder)), dtype="float32", block_size=BLOCK, enforce_eager=True,
        num_gpu_blocks_override=KV_BLOCKS, max_model_len=MAX_MODEL_LEN,
        **({} if options.device == "cpu" else {"gpu_memory_utilization": MEMORY_SHARE}),
    )  # fmt: skip
    with runtime_folder():
        factories = make_factories(engine_args, ("0", "1"), KvTransferSettings(lease_s=60), log_stats=False)
        instances: dict[str, VllmInstance] = {name: make(0) for name, make in factories.items()}
        try:
            for instance in instances.values():  # one by one: each looks at the memory that is free
                await instance.start()
            first, second = instances.values()
            await second.connect([first])
            async with Zoo(instances) as zoo:
                return await measure(zoo, (first, second), log)
        finally:
            await asyncio.gather(*(instance.stop(5.0) for instance in instances.values()))


def main() -> None:
    """Measure."""
    options = options_of(__doc__)
    settings = {"dtype": "float32", "tokens": TOKENS, "moves_after": MOVES_AFTER, "prompt_seed": 5}
    with tempfile.TemporaryDirectory() as folder, RowLog(options.rows, settings) as log:
        refused = asyncio.run(run_all(options, Path(folder), log))
    sys.exit(f"{refused} cases were refused; see above" if refused else 0)


if __name__ == "__main__":
    main()
