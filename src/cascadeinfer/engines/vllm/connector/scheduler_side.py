"""
The connector's half beside vLLM's scheduler: cut, pin, resume, reserve, report.

Rules found out by experiment, each with a regression test in `tests/engine`:

- Cut: cap the request's `max_tokens` at what it has plus what is in flight (at least one), so that it ends by length in the next
  step or two; only then does it carry `do_remote_decode`, else every normal end would pin its blocks.
- A request of N tokens has KV for N - 1: the last one was sampled, not yet computed. Exactly N - 1 are offered and asked for, and the
  block ids are trimmed to them; one more kills the target at a block boundary, surplus blocks are taken from the wrong end.
- A cut request that ended by itself (EOS, stop token, its own `max_tokens`, the model's maximum) is a real end and pins nothing.
- A resumed request gets all N ids as its prompt; here they are split back, so that to the scheduler it looks preempted.
- The V1 model runner knows prompt ids only: for it the new-request data is rewritten to hold all ids, `min_tokens` is shifted, and
  the output counts it is told later (after a preemption or a skipped step it rebuilds its state from them) leave out the tokens that
  came with the request.

Everything here runs in the EngineCore's thread, between or inside steps; there are no locks.
"""

import socket
import threading
import time
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from cascadeinfer.engines.vllm.connector.side_channel import SideChannel
from cascadeinfer.engines.vllm.connector.step_timer import StepTimer
from cascadeinfer.engines.vllm.connector.ticket import (
    CUT,
    PROMPT_TOKENS,
    RESERVATION,
    TransferParams,
    is_resumed,
    reservation_prefix,
)

RESERVATION_LIFE_S = 60.0
"""A reservation nobody claims (its controller died) ends by itself after this long, unless the transfer configuration says otherwise."""


@dataclass(slots=True)
class Reservation:
    """Blocks held for a request that is about to arrive."""

    blocks: list[KVCacheBlock]
    expires_s: float


@dataclass(slots=True)
class PendingCut:
    """What a cut request was before, to undo the cut."""

    max_tokens: int
    kv_transfer_params: TransferParams | None


class CascadeSchedulerSide(NixlPullConnectorScheduler):
    """NIXL's pull scheduler with the rules of the module header."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        """See NixlPullConnectorScheduler."""
        self.side_channel = SideChannel()
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self._is_v1_runner = not vllm_config.use_v2_model_runner
        groups = kv_cache_config.kv_cache_groups
        #: Whether running requests can move at all: one group of full-attention layers, no speculation, no pipeline.
        self.movable = (
            len(groups) == 1
            and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)
            and vllm_config.speculative_config is None
            and vllm_config.parallel_config.pipeline_parallel_size == 1
        )
        self._kv_cache_manager: KVCacheManager | None = None
        #: Cut requests that have not finished yet, by id.
        self._cuts: dict[str, PendingCut] = {}
        #: Resumed requests whose grammar has not been replayed yet.
        self._grammars_to_replay: set[str] = set()
        #: Output tokens that each resumed request here brought with it, by id, while it lives.
        self._brought_tokens: dict[str, int] = {}
        #: Resumed requests that the V1 model runner has not seen yet.
        self._unseen: dict[str, Request] = {}
        self._reservations: dict[str, Reservation] = {}
        self._reservation_life_s = float(
            vllm_config.kv_transfer_config.get_from_extra_config("reservation_life_s", RESERVATION_LIFE_S)
        )
        #: Migrations at once, of all front-end processes together; None: the only process keeps to its limit itself.
        self.max_migrations: int | None = None
        #: Cut requests whose blocks are pinned until they are pulled, released or their lease ends.
        self.pinned: dict[str, None] = {}
        #: Requests that are neither finished nor aborted: with any left, the next step follows at once.
        self._live: set[str] = set()
        self.timer = StepTimer()
        self.steps = 0
        self.scheduled_tokens = 0
        self.pulls = 0
        self.pulled_tokens = 0
        self.failed_pulls = 0

    def set_xfer_handshake_metadata(self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        """
        Listen for the handshakes of peers, on a port of the system's choice.

        A port that was chosen before may be taken by now, and then vLLM's listener ends while the start waits for it for ever. Here another
        socket holds the port until ZMQ has it: both may, since neither listens yet and both allow reuse.
        """
        if self._nixl_handshake_listener_t is not None:  # it listens already
            return
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((self.side_channel_host, 0))
            self.side_channel_port = holder.getsockname()[1]
            super().set_xfer_handshake_metadata(metadata)  # returns when ZMQ has bound

    def _nixl_handshake_listener(
        self,
        encoded_data: dict[tuple[int, int], bytes],
        ready: threading.Event,
        stop: threading.Event,
        host: str,
        port: int,
    ) -> None:
        """In vLLM's thread: ours survives messages that are none."""
        self.side_channel.listen(encoded_data, ready, stop, host, port)

    # --- commands (between steps) ------------------------------------------------------------------------------------

    def cut(self, request: Request | None) -> str | None:  # noqa: PLR0911 - one line per reason
        """
        End this request at its next token and pin its blocks.

        Returns:
            None when the cut is under way, else why not: `unknown`, `waiting`, `prefilling`, `already_cut`, `ending`.
        """
        if request is None or request.is_finished():
            return "unknown"
        if request.request_id in self._cuts:
            return "already_cut"
        if request.status != RequestStatus.RUNNING or request.num_stale_output_tokens:
            return "waiting"
        if request.num_output_tokens == 0 or request.is_prefill_chunk:
            return "prefilling"
        in_flight = request.num_output_placeholders
        last_output_tokens = request.num_output_tokens + max(in_flight, 1)
        if last_output_tokens >= request.max_tokens:
            return "ending"
        if request.num_prompt_tokens + last_output_tokens >= self.max_model_len:
            return "ending"
        self._cuts[request.request_id] = PendingCut(request.max_tokens, request.kv_transfer_params)
        request.max_tokens = last_output_tokens
        request.kv_transfer_params = {"do_remote_decode": True}
        self._reqs_in_batch.add(request.request_id)  # else the worker ignores the pin
        return None

    def undo_cut(self, request: Request | None) -> bool:
        """Let a request that was cut go on; False when it has finished already (the cut stands)."""
        if request is None or request.is_finished():
            return False
        pending = self._cuts.pop(request.request_id, None)
        if pending is None:
            return False
        request.max_tokens = pending.max_tokens
        request.kv_transfer_params = pending.kv_transfer_params
        return True

    def reserve(self, reservation_id: str, n_tokens: int) -> bool:
        """Hold blocks for a request of this many tokens (one more than it fills); False when they are not free."""
        manager = self._manager()
        self._expire_reservations()
        if reservation_id in self._reservations:
            return True
        n_blocks = -(-n_tokens // self.block_size) + 1
        pool = manager.block_pool
        if pool.get_num_free_blocks() < n_blocks:
            return False
        blocks = pool.get_new_blocks(n_blocks)
        self._reservations[reservation_id] = Reservation(blocks, time.monotonic() + self._reservation_life_s)
        return True

    def release_reservation(self, reservation_id: str) -> bool:
        """Give reserved blocks back; False when there is no such reservation."""
        reservation = self._reservations.pop(reservation_id, None)
        if reservation is None:
            return False
        self._manager().block_pool.free_blocks(reservation.blocks)
        return True

    def release_reservations_of(self, client_index: int) -> None:
        """A front-end process is gone: nobody will claim what it reserved."""
        prefix = reservation_prefix(client_index)
        for reservation_id in [r for r in self._reservations if r.startswith(prefix)]:
            self.release_reservation(reservation_id)

    def n_leaving(self) -> int:
        """Cut requests: those about to end here, and those whose blocks wait to be pulled."""
        return len(self._cuts) + len(self.pinned)

    def n_reserved(self) -> int:
        """Reservations that hold blocks now."""
        self._expire_reservations()
        return len(self._reservations)

    def free_blocks(self) -> int:
        """Blocks that are free (cached or not)."""
        return int(self._manager().block_pool.get_num_free_blocks())

    # --- hooks that vLLM's scheduler calls --------------------------------------------------------------------------

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Called once, when the scheduler has built its KV cache manager."""
        self._kv_cache_manager = kv_cache_manager

    def on_new_request(self, request: Request) -> None:
        """Split a resumed request back into prompt and output, and hand it its reserved blocks."""
        self._live.add(request.request_id)
        params = request.kv_transfer_params
        if is_resumed(params):
            assert params is not None
            self._split(request, params[PROMPT_TOKENS])
            if (reservation_id := params.get(RESERVATION)) is not None:
                self.release_reservation(reservation_id)
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Ask for exactly the N - 1 tokens that have KV, less those in the local prefix cache."""
        if request.request_id in self._grammars_to_replay:
            self._replay_grammar(request)
        params = request.kv_transfer_params
        if not is_resumed(params):
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        assert params is not None
        if not params.get("do_remote_prefill"):
            return 0, False
        wanted = min(params.get("remote_num_tokens", 0), request.num_tokens - 1) - num_computed_tokens
        return (wanted, True) if wanted > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Count the pull that is about to start."""
        if num_external_tokens > 0 and is_resumed(request.kv_transfer_params):
            self.pulls += 1
            self.pulled_tokens += num_external_tokens
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, TransferParams | None]:
        """Pin the blocks of a cut request; let every real end go its normal way."""
        pending = self._cuts.pop(request.request_id, None)
        self._forget(request.request_id)
        if pending is None:
            return super().request_finished(request, block_ids)
        if self._is_real_end(request, pending.max_tokens):
            self._reqs_not_processed.add(request.request_id)
            request.kv_transfer_params = pending.kv_transfer_params
            return False, None
        n_computed = min(request.num_tokens - 1, request.num_computed_tokens)
        n_blocks = -(-n_computed // self.block_size)
        delay_free, params = super().request_finished(request, tuple(list(group)[:n_blocks] for group in block_ids))
        if params is None:
            params = {}
        params["remote_num_tokens"] = n_computed if delay_free else 0
        params[CUT] = True
        if delay_free:
            self.pinned[request.request_id] = None
        else:
            self._reqs_not_processed.add(request.request_id)
        return delay_free, params

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Count the step, and tell the V1 model runner of resumed requests in its own terms."""
        self.timer.scheduled(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens > 0:
            self.steps += 1
            self.scheduled_tokens += scheduler_output.total_num_scheduled_tokens
        if self._is_v1_runner and self._brought_tokens:
            self._rewrite_for_v1(scheduler_output)
        return super().build_connector_meta(scheduler_output)

    def step_ended(self) -> None:
        """The scheduler has taken a step's output in."""
        self.timer.ended(busy=bool(self._live))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Forget pins whose blocks the worker has let go, and count pulls that failed."""
        super().update_connector_output(connector_output)
        self.failed_pulls += len(connector_output.failed_recving or ())
        for request_id in connector_output.finished_sending or ():
            self.pinned.pop(request_id, None)

    # --- the steps behind them --------------------------------------------------------------------------------------

    def _split(self, request: Request, prompt_tokens: int) -> None:
        """Make a request whose prompt holds all ids look like one that was preempted after `prompt_tokens` + output."""
        assert request.prompt_token_ids is not None
        output_ids = request.prompt_token_ids[prompt_tokens:]
        request.prompt_token_ids = request.prompt_token_ids[:prompt_tokens]
        request.num_prompt_tokens = prompt_tokens
        request._output_token_ids.extend(output_ids)  # noqa: SLF001 - the list behind the read-only output_token_ids
        request.prefill_stats = None  # else an assertion (computed <= prompt) ends the engine
        self._brought_tokens[request.request_id] = len(output_ids)
        if self._is_v1_runner:
            self._unseen[request.request_id] = request
        if request.use_structured_output and output_ids:
            self._grammars_to_replay.add(request.request_id)

    def _replay_grammar(self, request: Request) -> None:
        """Bring a compiled grammar to where the output so far has taken it; the scheduler waits for the compilation."""
        self._grammars_to_replay.discard(request.request_id)
        structured = request.structured_output_request
        assert structured is not None
        grammar = structured.grammar
        assert isinstance(grammar, StructuredOutputGrammar), "scheduled before its grammar was compiled"
        if not grammar.accept_tokens(request.request_id, list(request.output_token_ids)):
            raise RuntimeError(f"request {request.request_id}: its own output does not fit its grammar")

    def _rewrite_for_v1(self, scheduler_output: SchedulerOutput) -> None:
        for new_request in scheduler_output.scheduled_new_reqs:
            request = self._unseen.pop(new_request.req_id, None)
            if request is None:
                continue
            new_request.prompt_token_ids = list(request.all_token_ids)
            brought = self._brought_tokens[new_request.req_id]
            if new_request.sampling_params is not None and new_request.sampling_params.min_tokens:
                shifted = new_request.sampling_params.clone()
                shifted.min_tokens = max(0, shifted.min_tokens - brought)
                new_request.sampling_params = shifted
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            cached.num_output_tokens[index] -= self._brought_tokens.get(request_id, 0)

    def _is_real_end(self, request: Request, max_tokens: int) -> bool:
        """Whether a finished request that was being cut would have ended here anyway."""
        return (
            request.status != RequestStatus.FINISHED_LENGTH_CAPPED
            or request.num_output_tokens >= max_tokens
            or request.num_tokens >= self.max_model_len
        )

    def _forget(self, request_id: str) -> None:
        self._live.discard(request_id)
        if not self._live:
            self.timer.idle()
        self._grammars_to_replay.discard(request_id)
        self._brought_tokens.pop(request_id, None)
        self._unseen.pop(request_id, None)

    def _expire_reservations(self) -> None:
        now_s = time.monotonic()
        for reservation_id in [r for r, held in self._reservations.items() if held.expires_s <= now_s]:
            self.release_reservation(reservation_id)

    def _manager(self) -> KVCacheManager:
        assert self._kv_cache_manager is not None, "the scheduler has not bound its KV cache manager"
        return self._kv_cache_manager
