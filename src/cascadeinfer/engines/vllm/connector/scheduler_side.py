"""
The connector's half beside vLLM's scheduler: cut, pin, resume, reserve, report.

Rules found by experiment, each with a regression test in `tests/engine`:

- Cut: cap the request's `max_tokens` at what it has plus what is in flight (at least one), so that it ends by length in
  the next step or two. Only then does it carry `do_remote_decode`; otherwise every normal end would pin its blocks.
- A request of N tokens has KV for N - 1: the last one was sampled, not yet computed. Exactly N - 1 are offered and
  asked for, and the block ids are trimmed to them; one more kills the target at a block boundary, and surplus blocks
  are taken from the wrong end.
- A cut can be armed when a request comes: it then carries the lowered cap and `do_remote_decode` from the start, as the
  requests of a prefill instance do in NIXL's own use, and NIXL puts it in the batch by itself.
- A cut request that ended by itself (EOS, stop token, its own `max_tokens`, the model's maximum) is a real end and pins
  nothing.
- A resumed request gets all N ids as its prompt; they are split here, so that to the scheduler it looks preempted.
- The V1 model runner knows prompt ids only (`v1_runner.py`).
- Only the front end's words (`words.py`) are acted upon; `request.kv_transfer_params` holds them and nothing from a
  client.
- A hook that fails for a request ends that request (`failures.py`): an exception in a hook would end the engine.

Everything here runs in the EngineCore's thread, between or inside steps; there are no locks.
"""

import logging
import socket
import threading
import time
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from cascadeinfer.core.refusals import Refusal
from cascadeinfer.engines.vllm.connector.cuts import Cuts, PendingCut
from cascadeinfer.engines.vllm.connector.deadline import attach_deadlines, is_over
from cascadeinfer.engines.vllm.connector.failures import Failures
from cascadeinfer.engines.vllm.connector.grammar_replay import replay_grammar
from cascadeinfer.engines.vllm.connector.loads_along import LoadsAlong
from cascadeinfer.engines.vllm.connector.movable import why_not_movable
from cascadeinfer.engines.vllm.connector.precopy import FullBlockPins, Precopies
from cascadeinfer.engines.vllm.connector.reservations import Reservations
from cascadeinfer.engines.vllm.connector.side_channel import SideChannel
from cascadeinfer.engines.vllm.connector.step_timer import StepTimer
from cascadeinfer.engines.vllm.connector.ticket import (
    CUT,
    PARK,
    PROMPT_TOKENS,
    RESERVATION,
    TransferParams,
    is_resumed,
)
from cascadeinfer.engines.vllm.connector.v1_runner import V1Terms
from cascadeinfer.engines.vllm.connector.words import Desk, check_words
from cascadeinfer.engines.vllm.messages import ModelRunner

if TYPE_CHECKING:
    from cascadeinfer.engines.vllm.connector.door import Door

logger = logging.getLogger(__name__)

RESERVATION_LIFE_S = 60.0
"""Until an unclaimed reservation (its controller died) expires; the transfer configuration may say otherwise."""


class CascadeSchedulerSide(NixlPullConnectorScheduler):
    """NIXL's pull scheduler with the rules of the module header."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        """See NixlPullConnectorScheduler."""
        self.side_channel = SideChannel()
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        #: What the workers run the model with.
        self.model_runner: ModelRunner = "V2" if vllm_config.use_v2_model_runner else "V1"
        why_not = why_not_movable(vllm_config, kv_cache_config.kv_cache_groups)
        if why_not is not None:
            logger.warning("requests stay on their instance, nothing migrates: %s", why_not)
        #: Whether running requests can migrate at all.
        self.movable = why_not is None
        self._kv_cache_manager: KVCacheManager | None = None
        #: Known from the first command on (see `commands.py`), which comes before the first request.
        self.scheduler: Scheduler | None = None
        #: Where front ends attach, once the engine is ready to serve; None if it is not configured for that.
        self.door: Door | None = None
        #: Sends loads along with outputs, once the engine is ready to serve.
        self.loads_along: LoadsAlong | None = None
        self._desk = Desk.of_this_process()
        #: For front ends that attach later; must not be logged.
        self.connector_token = self._desk.token
        self._failures = Failures()
        #: Cut requests that have not finished yet.
        self._cuts = Cuts(self.max_model_len, movable=self.movable)
        #: Resumed requests whose grammar has not been replayed yet.
        self._grammars_to_replay: set[str] = set()
        self._v1_terms = V1Terms()
        self.reservations = Reservations(
            self.block_size,
            float(vllm_config.kv_transfer_config.get_from_extra_config("reservation_life_s", RESERVATION_LIFE_S)),
        )
        #: Full blocks of running requests that peers may read, and what is read ahead of requests on their way here.
        self.full_block_pins = FullBlockPins(self.block_size, self._kv_lease_duration, self._cuts.may_go)
        self.precopies = Precopies(self.reservations, self.block_size)
        #: Limit on simultaneous migrations over all front-end processes; None: the only process enforces its own limit.
        self.max_migrations: int | None = None
        #: Cut requests whose blocks are pinned until they are pulled, released or their lease ends; whether their cut
        #: had been armed, so that they wait for somebody to move them.
        self.pinned: dict[str, bool] = {}
        #: Requests here that came from where they were parked.
        self.pushed: set[str] = set()
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
        Listen for the handshakes of peers, on a port chosen by the system.

        A port chosen in advance may be taken by now; vLLM's listener then ends while the start waits for it for ever.
        Here another socket holds the port until ZMQ has it: both can bind it, since neither listens yet and both allow
        reuse.
        """
        if self._nixl_handshake_listener_t is not None:  # it listens already, and tells peers what has changed
            super().set_xfer_handshake_metadata(metadata)
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
        """Run in vLLM's thread: our listener survives malformed messages."""
        self.side_channel.listen(encoded_data, ready, stop, host, port)

    # --- commands (between steps) ------------------------------------------------------------------------------------

    def cut(self, request: Request | None) -> Refusal | None:
        """
        End this request at its next token and pin its blocks.

        Returns:
            None when the cut is under way, else why not.
        """
        if request is None or request.is_finished():
            return Refusal.UNKNOWN
        if not self._cuts.may_go(request):
            return Refusal.UNMOVABLE
        if request.request_id in self._failures:
            return Refusal.ENDING
        if (refused := self._cuts.cut(request)) is not None:
            return refused
        self._reqs_in_batch.add(request.request_id)  # otherwise the worker ignores the pin
        self._reqs_not_processed.discard(
            request.request_id
        )  # left by an undone cut; the worker reads it after the line above
        return None

    def undo_cut(self, request: Request | None) -> bool:
        """Let a cut request go on; False when it has already finished (the cut stands)."""
        if request is None or request.is_finished() or not self._cuts.undo(request):
            return False
        if request.request_id in self._reqs_in_batch:
            self._reqs_in_batch.discard(request.request_id)  # no worker has heard of the cut
        else:
            self._reqs_not_processed.add(request.request_id)
        return True

    def n_leaving(self) -> int:
        """Cut requests of migrations: those about to end here, and those whose blocks wait to be pulled."""
        return self._cuts.n_of_migrations() + sum(not armed for armed in self.pinned.values())

    def renew_pin(self, request_id: str) -> bool | None:
        """
        Begin the lease on a cut request's blocks anew.

        Returns:
            Whether they are pinned; None if only the workers know.
        """
        if request_id not in self.pinned:
            return False
        if request_id not in self._reqs_need_send:
            return None
        self._reqs_need_send[request_id] = time.perf_counter() + self._kv_lease_duration
        return True

    @property
    def lease_s(self) -> int:
        """Seconds for which the blocks of a cut request are pinned."""
        return self._kv_lease_duration

    def free_blocks(self) -> int:
        """Blocks that are free (cached or not)."""
        return int(self._manager().block_pool.get_num_free_blocks())

    def has_requests_of(self, client_index: int) -> bool:
        """Whether a front end has requests here that have not ended."""
        requests = () if self.scheduler is None else self.scheduler.requests.values()
        return any(request.client_index == client_index and not request.is_finished() for request in requests)

    # --- hooks that vLLM's scheduler calls --------------------------------------------------------------------------

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Called once, when the scheduler has built its KV cache manager."""
        self._kv_cache_manager = kv_cache_manager
        self.reservations.pool = kv_cache_manager.block_pool
        self.full_block_pins.manager = kv_cache_manager

    def on_new_request(self, request: Request) -> None:
        """Split a resumed request back into prompt and output, and hand it its reserved blocks."""
        self._live.add(request.request_id)
        with self._failures.at(request, "on_new_request"):
            words = self._desk.take(request)
            if words is not None:
                park = words.pop(PARK, None)
                if words or not park:
                    self._resume(request, words)
                if park:
                    self._cuts.arm(request)
            super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """
        Ask for exactly the N - 1 tokens that have KV, less those in the local prefix cache; None keeps the request from
        running.
        """
        if request.request_id in self._failures:
            return None, False
        with self._failures.at(request, "get_num_new_matched_tokens"):
            return self._matched_tokens(request, num_computed_tokens)
        return None, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Count the pull that is about to start."""
        with self._failures.at(request, "update_state_after_alloc"):
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            if num_external_tokens > 0 and is_resumed(request.kv_transfer_params):
                self.pulls += 1
                self.pulled_tokens += num_external_tokens
        if request.request_id in self._failures:
            self._reqs_need_recv.pop(request.request_id, None)

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, TransferParams | None]:
        """
        Pin the blocks of a cut request; real ends take their normal course.

        A fault pins nothing; a cut request is still reported as cut, and continues elsewhere without its KV cache.
        """
        request_id = request.request_id
        pending = self._cuts.take(request_id)
        self._forget(request_id)
        try:
            return self._finished(request, block_ids, pending)
        except Exception:
            logger.exception("request %s leaves its KV cache behind: request_finished failed", request_id)
        for table in (self._reqs_need_send, self._reqs_need_recv, self.pinned):
            table.pop(request_id, None)
        self._reqs_not_processed.add(request_id)
        if pending is None or self._cuts.is_real_end(request, pending.max_tokens):
            return False, None
        return False, {CUT: True, "remote_num_tokens": 0}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Count the step, translate resumed requests for the V1 model runner, let failed ones end."""
        self.timer.scheduled(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens > 0:
            self.steps += 1
            self.scheduled_tokens += scheduler_output.total_num_scheduled_tokens
        if self.model_runner == "V1":
            self._v1_terms.rewrite(scheduler_output)
        self._drop_impossible_pulls()
        self._failures.hand_over(self.scheduler)
        pulls = [(r, request.kv_transfer_params or {}) for r, (request, *_) in self._reqs_need_recv.items()]
        metadata = super().build_connector_meta(scheduler_output)
        attach_deadlines(metadata, pulls)
        return metadata

    def step_ended(self) -> None:
        """The scheduler has processed a step's output."""
        self.timer.ended(busy=bool(self._live))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Forget pins whose blocks the worker has released, and count failed pulls."""
        super().update_connector_output(connector_output)
        self.failed_pulls += len(connector_output.failed_recving or ())
        for request_id in connector_output.finished_sending or ():
            self.pinned.pop(request_id, None)

    # --- the steps behind them --------------------------------------------------------------------------------------

    def _resume(self, request: Request, words: TransferParams) -> None:
        reservation_id = words.get(RESERVATION)
        try:
            check_words(words, request, self.block_size)
            if reservation_id is not None and words.get("do_remote_prefill"):
                self.precopies.adopt(request, reservation_id, words)
        finally:
            if isinstance(reservation_id, str):
                if self.reservations.is_for_parked(reservation_id):
                    self.pushed.add(request.request_id)
                self.reservations.release(reservation_id)
        request.kv_transfer_params = words
        self._split(request, words[PROMPT_TOKENS])

    def _split(self, request: Request, prompt_tokens: int) -> None:
        """Make a request whose prompt holds all ids look like one that was preempted after `prompt_tokens` + output."""
        assert request.prompt_token_ids is not None
        output_ids = request.prompt_token_ids[prompt_tokens:]
        if self.model_runner == "V1":
            self._v1_terms.came(request, len(output_ids))
        request.prompt_token_ids = request.prompt_token_ids[:prompt_tokens]
        request.num_prompt_tokens = prompt_tokens
        request._output_token_ids.extend(output_ids)  # noqa: SLF001 - the list behind the read-only output_token_ids
        request.prefill_stats = None  # otherwise an assertion (computed <= prompt) ends the engine
        if request.use_structured_output and output_ids:
            self._grammars_to_replay.add(request.request_id)

    def _matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.request_id in self._grammars_to_replay:
            self._grammars_to_replay.discard(request.request_id)
            assert self.scheduler is not None, "a request came before the first command"
            replay_grammar(self.scheduler.structured_output_manager, request)
        params = request.kv_transfer_params
        if not is_resumed(params):
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        assert params is not None
        if not params.get("do_remote_prefill"):
            return 0, False
        if is_over(params):
            logger.warning("request %s is computed anew: the time to pull it is over", request.request_id)
            self._stop_heartbeat(request.request_id)
            return 0, False  # NIXL still tells the source that its blocks are no longer needed
        wanted = min(params.get("remote_num_tokens", 0), request.num_tokens - 1) - num_computed_tokens
        return (wanted, True) if wanted > 0 else (0, False)

    def _finished(
        self, request: Request, block_ids: BlockIds, pending: PendingCut | None
    ) -> tuple[bool, TransferParams | None]:
        if pending is None:
            return super().request_finished(request, block_ids)
        if self._cuts.is_real_end(request, pending.max_tokens):
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
            self.pinned[request.request_id] = pending.armed
        else:
            self._reqs_not_processed.add(request.request_id)
        return delay_free, params

    def _drop_impossible_pulls(self) -> None:
        """Drop those of the pulls beginning with this step for which NIXL cannot make a description."""
        for request_id, (request, block_ids, cached, awaits) in list(self._reqs_need_recv.items()):
            with self._failures.at(request, "build_connector_meta"):
                NixlConnectorMetadata().add_new_req_to_recv(
                    request_id, block_ids, request.kv_transfer_params, cached, awaits
                )
                continue
            del self._reqs_need_recv[request_id]

    def _forget(self, request_id: str) -> None:
        self._live.discard(request_id)
        if not self._live:
            self.timer.idle()
        self._grammars_to_replay.discard(request_id)
        self.pushed.discard(request_id)
        self._v1_terms.forget(request_id)
        self._failures.forget(request_id)
        self._stop_heartbeat(request_id)

    def _manager(self) -> KVCacheManager:
        assert self._kv_cache_manager is not None, "the scheduler has not bound its KV cache manager"
        return self._kv_cache_manager
