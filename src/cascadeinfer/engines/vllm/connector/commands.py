"""
Commands to an instance: methods attached to vLLM's `EngineCore`.

vLLM's utility calls look a method up by name on the EngineCore and run it in the engine's thread between two steps, so
the commands may touch the scheduler's state. Arguments and results are plain values (msgpack). An engine without
requests does not step, but it does answer utility calls; a command that leaves work for a step (a release) therefore
relies on the finished request that still waits in the scheduler, which keeps the engine stepping.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.request import RequestStatus

from cascadeinfer.core.refusals import Refusal, why_not_step_budget
from cascadeinfer.engines.vllm.connector.door import Door, DoorSettings
from cascadeinfer.engines.vllm.connector.held_blocks import held_blocks
from cascadeinfer.engines.vllm.connector.identity import identity_of, kv_bytes_per_token
from cascadeinfer.engines.vllm.connector.loads_along import LoadsAlong
from cascadeinfer.engines.vllm.connector.precopy import precopy_ticket
from cascadeinfer.engines.vllm.connector.scheduler_side import CascadeSchedulerSide
from cascadeinfer.engines.vllm.connector.step_budget import step_budget_bounds
from cascadeinfer.engines.vllm.connector.ticket import TransferParams
from cascadeinfer.engines.vllm.connector.worker_side import (
    handshake_on_worker,
    precopied_on_worker,
    precopy_on_worker,
    release_on_worker,
    renew_on_worker,
)
from cascadeinfer.engines.vllm.messages import EngineHello, EngineLoad

logger = logging.getLogger(__name__)


def _side(core: EngineCore) -> CascadeSchedulerSide:
    connector = core.scheduler.get_kv_connector()
    assert connector is not None
    side = connector.connector_scheduler
    assert isinstance(side, CascadeSchedulerSide)
    side.scheduler = core.scheduler
    return side


def cascade_hello(core: EngineCore) -> dict[str, Any]:
    """The identity of this instance: its NIXL address and its capacity."""
    side = _side(core)
    config = core.vllm_config
    return EngineHello(
        engine_id=side.engine_id,
        host=side.side_channel_host,
        port=side.side_channel_port,
        tp_size=side.transfer_tp_size,
        block_size=side.block_size,
        kv_blocks=config.cache_config.num_gpu_blocks - 1,  # one block is vLLM's null block, never free
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        max_model_len=side.max_model_len,
        movable=side.movable,
        model_runner=side.model_runner,
        clock_s=time.monotonic(),
    ).plain()


def cascade_identity(core: EngineCore) -> dict[str, Any]:
    """The identity of this instance for cost profiles. It asks a worker, so it is too slow for reports."""
    bytes_per_token = kv_bytes_per_token(core.scheduler.kv_cache_config, core.vllm_config)
    return {**identity_of(core), "kv_bytes_per_token": bytes_per_token}


def cascade_handshake(core: EngineCore, engine_id: str, host: str, port: int, tp_size: int) -> bool:
    """Start or poll the NIXL handshake with a peer; True once every rank has done it."""
    if engine_id == _side(core).engine_id:
        return True
    done = core.model_executor.collective_rpc(handshake_on_worker, args=(engine_id, host, port, tp_size))
    return all(done)


def cascade_listens(core: EngineCore) -> bool:
    """Whether the side channel is open; a closed one is opened again."""
    return _side(core).side_channel.listens()


def cascade_reaches(core: EngineCore, host: str, port: int) -> bool | None:
    """Ask a peer's side channel, or look for its answer: whether it can be reached from here; None: not known yet."""
    return _side(core).side_channel.probes.poll(host, port)


def cascade_limit_migrations(core: EngineCore, max_migrations: int | None) -> None:
    """Limit simultaneous migrations from now on, whoever starts them."""
    _side(core).max_migrations = max_migrations


def _too_many_migrations(core: EngineCore) -> bool:
    """Whether the limit over all front-end processes is reached; a lone process enforces its own and sets none."""
    side = _side(core)
    if side.max_migrations is None:
        return False
    pulling = [
        request
        for request in core.scheduler.requests.values()
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and request.request_id not in side.pushed
    ]
    return side.n_leaving() + side.reservations.n_of_migrations() + len(pulling) >= side.max_migrations


def cascade_cut(core: EngineCore, request_id: str) -> str | None:
    """Cut a running request; None, or the value of the `Refusal` (see `CascadeSchedulerSide.cut`)."""
    if _too_many_migrations(core):
        return Refusal.MIGRATIONS.value
    refused = _side(core).cut(core.scheduler.requests.get(request_id))
    return None if refused is None else refused.value


def cascade_undo_cut(core: EngineCore, request_id: str) -> bool:
    """Undo a cut that has not taken effect; False when it has."""
    return _side(core).undo_cut(core.scheduler.requests.get(request_id))


def cascade_reserve(core: EngineCore, reservation_id: str, n_tokens: int, for_parked: bool = False) -> str | None:
    """Reserve blocks and a slot for a request on its way; None, or the value of the `Refusal`."""
    if not for_parked and _too_many_migrations(core):
        return Refusal.MIGRATIONS.value
    side = _side(core)
    _learn_of_stranded_precopies(core)
    scheduler = core.scheduler
    n_running, n_waiting = scheduler.get_request_counts()
    if n_running + n_waiting + len(side.reservations) >= scheduler.max_num_running_reqs:
        return Refusal.NO_SLOT.value
    spoken_for = scheduler._inflight_prefill_reserved_blocks()  # noqa: SLF001 - a pull must fit beside them, or it waits
    room = side.reservations.reserve(reservation_id, n_tokens, spoken_for=spoken_for, for_parked=for_parked)
    return None if room else Refusal.NO_BLOCKS.value


def cascade_release_reservation(core: EngineCore, reservation_id: str) -> bool:
    """Release a reservation."""
    return _side(core).reservations.release(reservation_id)


def cascade_release_pin(core: EngineCore, request_id: str) -> bool:
    """Release the blocks of a cut request that will not be pulled; False when none are pinned."""
    if request_id not in _side(core).pinned:
        return False
    core.model_executor.collective_rpc(release_on_worker, args=(request_id,))
    return True


def cascade_renew_pin(core: EngineCore, request_id: str) -> bool:
    """Begin the lease on a cut request's blocks anew; False when they are not pinned any more."""
    side = _side(core)
    renewed = side.renew_pin(request_id)
    if renewed is None:
        renewed = all(core.model_executor.collective_rpc(renew_on_worker, args=(request_id, side.lease_s)))
    return renewed


def cascade_pin_full_blocks(core: EngineCore, request_id: str) -> TransferParams | None:
    """Pin the full blocks of a running request for a peer; where they are, or None if there are none to be had."""
    side = _side(core)
    if side.use_host_buffer:
        return None  # blocks reach it when their request has ended
    block_ids = side.full_block_pins.pin(core.scheduler.requests.get(request_id))
    return precopy_ticket(side, request_id, block_ids) if block_ids else None


def cascade_release_full_blocks(core: EngineCore, request_id: str) -> bool:
    """Nobody reads a request's full blocks any more; False when they are not pinned (any more)."""
    return _side(core).full_block_pins.release(request_id)


def cascade_precopy(core: EngineCore, reservation_id: str, ticket: TransferParams, before_s: float | None) -> bool:
    """Begin to read what a peer has pinned into reserved blocks; False when that is not possible here."""
    block_ids = _side(core).precopies.begin(reservation_id, ticket)
    if block_ids is None:
        return False
    core.model_executor.collective_rpc(precopy_on_worker, args=(reservation_id, ticket, block_ids, before_s))
    return True


def cascade_precopied(core: EngineCore, reservation_id: str) -> bool | None:
    """Whether what was read ahead is here; None while it is being read."""
    precopies = _side(core).precopies
    if precopies.outcome(reservation_id) is None:
        precopies.learn(core.model_executor.collective_rpc(precopied_on_worker))
    return precopies.outcome(reservation_id)


def _learn_of_stranded_precopies(core: EngineCore) -> None:
    precopies = _side(core).precopies
    if precopies.stranded:
        precopies.learn(core.model_executor.collective_rpc(precopied_on_worker))


def cascade_set_step_budget(core: EngineCore, n_tokens: int | None) -> int | str:
    """
    Schedule at most this many tokens per step; None for as many as the configuration says.

    Returns:
        The budget in force from the next step on; a sentence if it cannot be this one.
    """
    least, most = step_budget_bounds(core.vllm_config)
    if n_tokens is not None and (why_not := why_not_step_budget(n_tokens, least, most)) is not None:
        return why_not
    core.scheduler.max_num_scheduled_tokens = most if n_tokens is None else n_tokens  # read at the start of each step
    return core.scheduler.max_num_scheduled_tokens


def cascade_forget_client(core: EngineCore, client_index: int) -> int:
    """Abort the requests and release the reservations of a dead front-end process. Returns the number of requests."""
    side = _side(core)
    side.timer.forget(client_index)
    if side.loads_along is not None:
        side.loads_along.forget(client_index)
    orphans = [r.request_id for r in core.scheduler.requests.values() if r.client_index == client_index]
    core.abort_requests(orphans)
    side.reservations.release_those_of(client_index)
    return len(orphans)


def cascade_attach(core: EngineCoreProc, input_address: str, output_address: str) -> dict[str, Any]:
    """A front end has bound these sockets: serve it. Only the listener in this process asks for it (`door.py`)."""
    door = _side(core).door
    assert door is not None, "it asks"
    number = door.clients.attach(input_address, output_address)
    return {"client": number, "ready_payload": msgspec.msgpack.encode(core._make_ready_response())}  # noqa: SLF001


def cascade_detach(core: EngineCore, client_index: int) -> int:
    """A front end that had attached is gone: abort what it has here. Returns how many requests those were."""
    n_requests = cascade_forget_client(core, client_index)
    door = _side(core).door
    if door is not None and door.clients.detach(client_index):
        logger.info("front end %s has left, %s requests of it were aborted", client_index, n_requests)
    return n_requests


def cascade_load(core: EngineCore, client_index: int, next_after_s: float | None = None) -> dict[str, Any]:
    """
    The current load as one front-end process sees it (`load_of`). With `next_after_s`, it also comes along with outputs
    from now on, not more often than every so many seconds.
    """
    _learn_of_stranded_precopies(core)
    if (along := _side(core).loads_along) is not None:
        along.told(client_index, next_after_s)
    return load_of(core, client_index)


def load_of(core: EngineCore, client_index: int) -> dict[str, Any]:
    """Lengths by request, foreign lengths, blocks, counters, and the steps since this front end was last told."""
    side = _side(core)
    running: list[tuple[str, int]] = []
    waiting: list[tuple[str, int]] = []
    foreign_running: list[int] = []
    foreign_waiting: list[int] = []
    for request in core.scheduler.requests.values():
        if request.is_finished():
            continue
        runs = request.status == RequestStatus.RUNNING
        if request.client_index == client_index:
            (running if runs else waiting).append((request.request_id, request.num_tokens))
        else:
            (foreign_running if runs else foreign_waiting).append(request.num_tokens)
    kv_blocks = core.vllm_config.cache_config.num_gpu_blocks - 1
    return EngineLoad(
        running=running,
        waiting=waiting,
        foreign_running=foreign_running,
        foreign_waiting=foreign_waiting,
        kv_blocks=kv_blocks,
        kv_blocks_used=kv_blocks - side.free_blocks(),
        reserved=len(side.reservations),
        pinned=list(side.pinned),
        held_blocks=held_blocks(
            core.scheduler, side.pinned, side.reservations.n_blocks(), side.full_block_pins.n_blocks()
        ),
        steps=side.steps,
        timed_steps=list(side.timer.take(client_index)),
        scheduled_tokens=side.scheduled_tokens,
        pulls=side.pulls,
        pulled_tokens=side.pulled_tokens,
        precopied_tokens=side.precopies.tokens,
        failed_pulls=side.failed_pulls,
        listens=side.side_channel.listens() if client_index == 0 else True,
        paused=core.is_scheduler_paused(),
        step_budget=core.scheduler.max_num_scheduled_tokens,
        clock_s=time.monotonic(),
    ).plain()


COMMANDS = (
    cascade_hello,
    cascade_identity,
    cascade_handshake,
    cascade_listens,
    cascade_reaches,
    cascade_limit_migrations,
    cascade_cut,
    cascade_undo_cut,
    cascade_reserve,
    cascade_release_reservation,
    cascade_release_pin,
    cascade_renew_pin,
    cascade_pin_full_blocks,
    cascade_release_full_blocks,
    cascade_precopy,
    cascade_precopied,
    cascade_set_step_budget,
    cascade_forget_client,
    cascade_attach,
    cascade_detach,
    cascade_load,
)


def _begin_serving(core: EngineCoreProc) -> None:
    """The EngineCore is ready: let front ends attach, if it is configured for that, and loads travel with outputs."""
    side = _side(core)
    transfer = core.vllm_config.kv_transfer_config
    assert transfer is not None, "our connector runs"
    if (settings := DoorSettings.of(transfer)) is not None:
        side.door = Door(core, settings, side.engine_id, side.connector_token)
    along = LoadsAlong(core.output_queue, functools.partial(load_of, core), side.has_requests_of)
    core.output_queue = side.loads_along = along


def _with_beginning(run: Callable[[EngineCoreProc], None]) -> Callable[[EngineCoreProc], None]:
    @functools.wraps(run)
    def run_busy_loop(core: EngineCoreProc) -> None:
        _begin_serving(core)
        run(core)

    run_busy_loop.is_ours = True  # type: ignore[attr-defined]
    return run_busy_loop


def attach() -> None:
    """Make the commands methods of `EngineCore`, and let it begin to serve as we want; idempotent."""
    for command in COMMANDS:
        setattr(EngineCore, command.__name__, command)
    if not hasattr(EngineCoreProc.run_busy_loop, "is_ours"):
        EngineCoreProc.run_busy_loop = _with_beginning(EngineCoreProc.run_busy_loop)
