"""
vLLM's own scheduler with our connector, but no model: sampled tokens are made up, and what a worker would pull arrives
at once.

Everything that decides about a request is real: scheduler, block pool, grammars and the connector's scheduler side.
What would kill an engine therefore raises here, in the test.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from cascadeinfer.engines.vllm.configuration import KvTransferSettings, instance_config
from cascadeinfer.engines.vllm.connector import cascade_connector, commands
from cascadeinfer.engines.vllm.connector.scheduler_side import CascadeSchedulerSide
from cascadeinfer.engines.vllm.connector.words import TOKEN_VARIABLE, with_words

BLOCK = 16
N_BLOCKS = 65
"""One of them is vLLM's null block."""
EOS_ID = 2


@cache
def _settings(model: Path, *, asynchronous: bool) -> tuple[VllmConfig, KVCacheConfig]:
    engine_args = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        block_size=BLOCK,
        enforce_eager=True,
        num_gpu_blocks_override=N_BLOCKS,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        distributed_executor_backend="uni",
    )
    config = instance_config(engine_args, "bed", KvTransferSettings())
    config.cache_config.num_gpu_blocks = N_BLOCKS
    config.scheduler_config.async_scheduling = asynchronous
    import torch

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    group = KVCacheGroupSpec(layer_names=["layer"], kv_cache_spec=spec)
    return config, KVCacheConfig(num_blocks=N_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group])


def make_bed(model: Path, *, asynchronous: bool = False, token: str = "the token") -> "SchedulerBed":  # noqa: S107 - a test's
    """A scheduler as an EngineCore would create it, started with this token."""
    import pytest

    config, kv_cache_config = _settings(model, asynchronous=asynchronous)
    manager = StructuredOutputManager(config)
    kind = AsyncScheduler if asynchronous else Scheduler
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, token)
        for name in ("nap_instead_of_spinning", "wake_up_politely", "end_with_parent"):  # this process is the tests'
            patch.setattr(cascade_connector, name, lambda: None)
        scheduler = kind(config, kv_cache_config, manager, block_size=BLOCK, hash_block_size=BLOCK)
    hash_with = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_with)
    bed = SchedulerBed(config, scheduler, manager, token, get_request_block_hasher(BLOCK, hash_with))
    bed.load()  # the first command
    return bed


def greedy(max_tokens: int = 64, **options: Any) -> SamplingParams:
    """Parameters as the front end would send them."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)
    params.update_from_generation_config({}, EOS_ID)
    return params


@dataclass
class SchedulerBed:
    """A scheduler, and the outputs that its clients have received."""

    config: VllmConfig
    scheduler: Scheduler
    manager: StructuredOutputManager
    token: str
    hasher: Any
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, EngineCoreOutput] = field(default_factory=dict)
    #: Tokens sampled for a request, in this order; 7 once there are none (left).
    to_sample: dict[str, list[int]] = field(default_factory=dict)
    #: Pulls ordered from the worker; all arrive with the next output, unless a test prevents it.
    pulled: list[Any] = field(default_factory=list)
    pulls_come: bool = True
    #: What arrives has failed.
    pulls_fail: bool = False
    #: Pins that the worker releases with the next output.
    read: set[str] = field(default_factory=set)
    _awaited: set[str] = field(default_factory=set)
    _under_way: list[tuple[SchedulerOutput, dict[str, list[int]]]] = field(default_factory=list)

    @property
    def side(self) -> CascadeSchedulerSide:
        """The connector's half."""
        side = self.scheduler.connector.connector_scheduler
        assert isinstance(side, CascadeSchedulerSide)
        return side

    @property
    def core(self) -> Any:
        """The parts of an EngineCore that commands need."""
        return SimpleNamespace(scheduler=self.scheduler, vllm_config=self.config, is_scheduler_paused=lambda: False)

    def load(self) -> dict[str, Any]:
        """The load report."""
        return commands.cascade_load(self.core, 0)

    def words(self, params: SamplingParams, **words: Any) -> SamplingParams:
        """Parameters that carry instructions from the front end."""
        return with_words(params, words, self.token)

    def add(self, request_id: str, prompt: list[int] | None, params: SamplingParams | None, **options: Any) -> Request:
        """Add a request, as `EngineCore.add_request` does."""
        request = Request(
            request_id, prompt, params, options.pop("pooling_params", None), block_hasher=self.hasher, **options
        )
        if request.use_structured_output:
            self.manager.grammar_init(request)
            while not request.structured_output_request.is_grammar_ready:  # compiled in a thread
                pass
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        """Schedule, pretend to compute, process the output (the previous step's with asynchronous scheduling)."""
        output = self.scheduler.schedule()
        for request_id, pull in output.kv_connector_metadata.reqs_to_recv.items():
            self.pulled.append(pull)
            if pull.awaiting_kvs:
                self._awaited.add(request_id)
        sampled = {}
        for request_id in output.num_scheduled_tokens:
            left = self.to_sample.get(request_id)
            is_chunk = self.scheduler.requests[request_id].is_prefill_chunk
            sampled[request_id] = [] if is_chunk else [left.pop(0) if left else 7]
        self._under_way.append((output, sampled))
        if len(self._under_way) > (1 if isinstance(self.scheduler, AsyncScheduler) else 0):
            self._take_in(*self._under_way.pop(0))

    def _take_in(self, output: SchedulerOutput, sampled: dict[str, list[int]]) -> None:
        if output.has_structured_output_requests:
            self.scheduler.get_grammar_bitmask(output)
        come = set(self._awaited) if self.pulls_come else set()
        self._awaited -= come
        failed = come if self.pulls_fail else set()
        read, self.read = self.read, set()
        made = ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={request_id: index for index, request_id in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=KVConnectorOutput(finished_recving=come, finished_sending=read, failed_recving=failed),
        )
        for outputs in self.scheduler.update_from_output(output, made).values():
            for delta in outputs.outputs:
                assert delta.request_id not in self.ends, "words after the last word"
                self.tokens.setdefault(delta.request_id, []).extend(delta.new_token_ids)
                if delta.finish_reason is not None:
                    self.ends[delta.request_id] = delta

    def steps(self, n: int) -> None:
        """Make this many steps."""
        for _ in range(n):
            self.step()

    def failed(self, request_id: str) -> bool:
        """Whether the request has ended with an error."""
        return request_id in self.ends and self.ends[request_id].finish_reason == FinishReason.ERROR

    def holds_nothing(self) -> bool:
        """Whether no request, block or entry is left."""
        side = self.side
        tables = (side._cuts, side.pinned, side._live, side._grammars_to_replay, side._heartbeat_req_engine)
        load = self.load()
        return not (
            self.scheduler.requests or any(tables) or load["kv_blocks_used"] or any(load["held_blocks"].values())
        )
