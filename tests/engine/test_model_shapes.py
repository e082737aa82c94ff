"""
Models of the shapes that people serve move without a trace, or stay, as `docs/migration.md` says of each.

Each is a tiny random model on two connected instances. `tests/engines/test_movable.py` decides the shapes that vLLM's
CPU build cannot run from their KV cache specifications.
"""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shapes import AUDIO_RATE_HZ, AUDIO_TOKEN, LORA_RANK, write_adapter, write_model
from zoo import BLOCK, MIN_MARGIN, Attempt, Zoo, greedy, random_prompt

from conftest import FORK

if TYPE_CHECKING:
    from cascadeinfer.core.events import PinReason
    from cascadeinfer.engines.protocol import EngineRequest
    from cascadeinfer.engines.vllm.instance import VllmInstance

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("quick_environment"),
    pytest.mark.runner("V1"),
]

N_PROMPT = 100
"""Longer than a sliding window; three full blocks of 32."""
N_OUTPUT = 60
TRIES = 20
"""Of a move; a request may end before it is cut, as the engines do not wait for this process."""


@dataclass(frozen=True, slots=True)
class SetUp:
    """
    A model and how it is served.

    Attributes:
        model: In `shapes.CONFIGS`.
        options: Of vLLM, beside those of all tests.
        block_tokens: What the block size must be in effect.
        ranks: Processes that compute.
        n_output: Tokens of a test's text.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    block_tokens: int = BLOCK
    ranks: int = 1
    n_output: int = N_OUTPUT


WITHIN_FOUR_BLOCKS = 28
"""
Of gpt-oss's text. VLLM's CPU build computes the first token of a fifth block (position 128) differently when the block
has been used before, on one instance without moves (5 of 8 runs of one prompt differed there).
"""
ONE_KIND = {"disable_hybrid_kv_cache_manager": True}
MOVE = {
    "llama": SetUp("llama"),
    "qwen3": SetUp("qwen3"),
    "qwen3_moe": SetUp("qwen3_moe"),
    "phi3": SetUp("phi3"),
    "gemma3, one kind of KV cache": SetUp("gemma3", ONE_KIND),
    "gpt_oss, one kind of KV cache": SetUp("gpt_oss", ONE_KIND, n_output=WITHIN_FOUR_BLOCKS),
    "deepseek, blocks of 16": SetUp("deepseek", {"attention_backend": "CPU_MLA"}, block_tokens=16),
    "fp8 KV cache": SetUp("llama", {"kv_cache_dtype": "fp8"}),
}
STAY = {
    "gemma3": SetUp("gemma3"),
    "gpt_oss": SetUp("gpt_oss", n_output=WITHIN_FOUR_BLOCKS),
    "falcon_h1": SetUp("falcon_h1", block_tokens=96),  # vLLM makes blocks as large as a state
}


PIPELINE = SetUp("llama", {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, ranks=2)


@contextlib.asynccontextmanager
async def two_instances(folder: Path, set_up: SetUp) -> AsyncIterator[Zoo]:
    """The model on two connected instances, one with asynchronous scheduling; at the end they must hold nothing."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from cascadeinfer.engines.vllm.configuration import KvTransferSettings
    from cascadeinfer.engines.vllm.launch import make_factories

    engine_args = AsyncEngineArgs(
        model=str(write_model(folder / "model", set_up.model)),
        dtype="float32",
        block_size=BLOCK,
        enforce_eager=True,
        num_gpu_blocks_override=129,
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        **{"distributed_executor_backend": "uni"} | set_up.options,
    )
    instances: dict[str, VllmInstance] = {}
    cores = sorted(os.sched_getaffinity(0))
    for number, name in enumerate(("async", "sync")):
        core = str(cores[number % len(cores)])
        environment = {**FORK, "VLLM_CPU_OMP_THREADS_BIND": "|".join([core] * set_up.ranks)}
        factories = make_factories(
            engine_args, (name,), KvTransferSettings(lease_s=60), log_stats=False, extra_environment=environment
        )
        instances[name] = factories[name](0)
        instances[name].config.scheduler_config.async_scheduling = name == "async"
    both = list(instances.values())
    try:
        await asyncio.gather(*(instance.start() for instance in both))
        await both[1].connect(both[:1])
        assert [instance.hello.block_size for instance in both] == [set_up.block_tokens] * 2
        async with Zoo(instances) as zoo:
            yield zoo
            await zoo.settled()
    finally:
        await asyncio.gather(*(instance.stop(5.0) for instance in both))


def pin_of(instance: "VllmInstance", request: "EngineRequest") -> "PinReason | None":
    """Why the front end would keep this request where it is."""
    from cascadeinfer.frontend.pins import Pins

    pins = Pins(instance.config, movable=instance.movable, model_runner=instance.hello.model_runner)
    return pins.reason_of(request.payload)


async def text_of_both(zoo: Zoo, n_output: int) -> tuple[list[int], list[int]]:
    """
    A prompt and its text, the same on both instances, free of near ties.

    A near tie between experts, which are chosen in every layer, shows in no margin of the output.
    """
    here, there = zoo.instances.values()
    for seed in range(TRIES):
        prompt = random_prompt(N_PROMPT, seed)
        alone = await zoo.run(here, prompt, greedy(n_output, logprobs=2))
        if min(alone.margins) >= MIN_MARGIN:
            texts = [(await zoo.run(one, prompt, greedy(n_output))).output for one in (there, here, there)]
            if texts == [alone.output] * 3:
                return prompt, alone.output
    raise AssertionError("each text has a near tie")


async def text_that_shows_its_cache(zoo: Zoo, n_output: int) -> tuple[list[int], list[int]]:
    """A prompt and its text, which is another one if a block in the middle of the prompt is."""
    prompt, expected = await text_of_both(zoo, n_output)
    changed = prompt[:BLOCK] + random_prompt(BLOCK, 1) + prompt[2 * BLOCK :]
    there = zoo.instances["sync"]
    assert (await zoo.run(there, prompt, greedy(n_output))).output == expected
    assert (await zoo.run(there, changed, greedy(n_output))).output != expected
    return prompt, expected


async def moves_both_ways(zoo: Zoo, n_output: int = N_OUTPUT) -> None:
    """A request moves from each instance to the other, pulls its KV cache, and its text is that without a move."""
    prompt, expected = await text_that_shows_its_cache(zoo, n_output)
    here, there = zoo.instances.values()
    for source, target in ((here, there), (there, here)):
        before = await zoo.counters(target)
        for _ in range(TRIES):
            attempt = await zoo.start(source, prompt, greedy(n_output), hold_at=len(prompt) + 10)
            assert pin_of(source, attempt.request) is None
            await attempt.until_output(3)
            moved = await zoo.move(attempt, target)
            assert (await moved.until_end()).output == expected
            if moved is not attempt:
                break
        after = await zoo.counters(target)
        assert after.pulls == before.pulls + 1
        assert after.pulled_tokens - before.pulled_tokens == attempt.n_tokens - 1
        assert after.failed_pulls == before.failed_pulls


def has_fp8_cache() -> bool:
    """Whether vLLM keeps an FP8 KV cache on this processor; as in its `v1/attention/backends/cpu_attn.py`."""
    import torch

    return bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())


@pytest.mark.parametrize("name", MOVE)
async def test_moves(tmp_path: Path, name: str) -> None:
    """One move each way leaves the text unchanged."""
    if "kv_cache_dtype" in MOVE[name].options and not has_fp8_cache():
        pytest.skip("vLLM has an FP8 KV cache on processors with AVX-512 or AMX only")
    async with two_instances(tmp_path, MOVE[name]) as zoo:
        await moves_both_ways(zoo, MOVE[name].n_output)


@pytest.mark.parametrize("name", STAY)
async def test_stays(tmp_path: Path, name: str) -> None:
    """
    Every request is pinned, a cut is refused, and the text comes to its end.

    If the instance dies, the request continues on the other one, computed anew, and its text is the same.
    """
    async with two_instances(tmp_path, STAY[name]) as zoo:
        here, there = zoo.instances.values()
        n_output = STAY[name].n_output
        assert not here.movable
        prompt, expected = await text_that_shows_its_cache(zoo, n_output)
        for _ in range(TRIES):
            attempt = await zoo.start(here, prompt, greedy(n_output))
            reason = pin_of(here, attempt.request)
            assert reason is not None
            assert reason.value == "engine"
            await attempt.until_output(3)
            refused = await here.cut(attempt.engine_request_id)
            assert refused in {"unmovable", "unknown"}
            await here.abort([attempt.engine_request_id])  # as good as its death
            so_far = dataclasses.replace(attempt, token_ids=list(attempt.token_ids))
            if refused == "unmovable" and len(so_far.output) < n_output:
                break
        assert refused == "unmovable"
        assert len(so_far.output) < n_output
        elsewhere = await zoo.resume(so_far, there, ticket=None)
        assert (await elsewhere.until_end()).output == expected


async def test_pipeline_parallelism_starts(tmp_path: Path) -> None:
    """
    Two such instances start beside each other, shake no hands and move nothing.

    No request runs: the CPU build makes the tensors between the stages only while it compiles the model, and fails at
    the first request without.
    """
    async with two_instances(tmp_path, PIPELINE) as zoo:
        assert [instance.movable for instance in zoo.instances.values()] == [False, False]


async def run_payload(zoo: Zoo, instance: "VllmInstance", attempt: Attempt, **changed: Any) -> Attempt:
    """Run another request that differs from a finished one in these fields of vLLM's."""
    payload = attempt.request.payload
    again = type(payload)(**{name: getattr(payload, name) for name in payload.__struct_fields__} | changed)
    request = dataclasses.replace(attempt.request, request_id=again.request_id, payload=again)
    new = await zoo._add(Attempt(instance, again.request_id, request), None)
    return await new.until_end()


async def test_lora(tmp_path: Path) -> None:
    """Requests of the base model move; one with an adapter is pinned, and its text is another one."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter")))
    set_up = SetUp("llama", {"enable_lora": True, "max_lora_rank": LORA_RANK, "max_loras": 1})
    async with two_instances(tmp_path, set_up) as zoo:
        await moves_both_ways(zoo)
        prompt, expected = await zoo.reference(N_PROMPT, N_OUTPUT)
        here = zoo.instances["async"]
        plain = await zoo.run(here, prompt, greedy(N_OUTPUT))
        adapted = await run_payload(zoo, here, plain, request_id="adapted", lora_request=adapter)
        reason = pin_of(here, adapted.request)
        assert reason is not None
        assert reason.value == "lora"
        assert len(adapted.output) == N_OUTPUT
        assert adapted.output != expected


async def test_audio(tmp_path: Path) -> None:
    """Of a model that hears, text moves; a request with audio is pinned, and is answered."""
    import numpy as np
    from vllm.v1.engine.input_processor import InputProcessor

    async with two_instances(tmp_path, SetUp("qwen2_audio")) as zoo:
        await moves_both_ways(zoo)
        here = zoo.instances["async"]
        sound = np.random.default_rng(0).standard_normal(AUDIO_RATE_HZ).astype(np.float32)
        prompt: Any = {"prompt": f"{AUDIO_TOKEN} what is this?", "multi_modal_data": {"audio": (sound, AUDIO_RATE_HZ)}}
        payload = InputProcessor(here.config).process_inputs("audio", prompt, greedy(8), ("generate",))
        plain = await zoo.run(here, payload.prompt_token_ids, greedy(8))
        heard = await run_payload(zoo, here, plain, request_id="audio", mm_features=payload.mm_features)
        reason = pin_of(here, heard.request)
        assert reason is not None
        assert reason.value == "multimodal"
        assert len(heard.output) == 8
        assert heard.output != plain.output
