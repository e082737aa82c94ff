"""
A follower's process: the composition root of a front end over instances that are another process's concern.

See `cascadeinfer.frontend.processes`; process 0 is put together in `assemble.py`.
"""

import asyncio
import contextlib
import dataclasses
import math
import socket
from argparse import Namespace
from collections.abc import Callable, MutableSequence
from typing import Final

import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.config.event_log import event_log_of, metrics_with
from cascadeinfer.config.policy import make_policy
from cascadeinfer.config.rules import rules_of
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.config.supervision import supervision_of
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.engines.vllm.connector.orphan import end_with_parent
from cascadeinfer.engines.vllm.followed import followed_factories
from cascadeinfer.engines.vllm.launch import attached_factories, parse_engine_args
from cascadeinfer.eventlog.unwritten_log import failure_of
from cascadeinfer.frontend.logs import set_up_logs
from cascadeinfer.frontend.processes.board import Board
from cascadeinfer.frontend.processes.follower import Follower
from cascadeinfer.frontend.processes.messages import FromOwner
from cascadeinfer.frontend.running import running_llm
from cascadeinfer.frontend.server import SharedServing, import_parser_plugins, serve
from cascadeinfer.frontend.stop_signals import StopSignals
from cascadeinfer.results.provenance import own_commit
from cascadeinfer.runtime.shell import Runtime

REATTACH_S: Final = 0.05
"""A follower waits for process 0 to report an instance up again, not for its own back-off."""


def run_follower(
    args: Namespace,
    options: ServeOptions,
    index: int,
    listener: socket.socket,
    channel_end: socket.socket,
    loads: MutableSequence[int],
) -> None:
    """
    Run a follower in its own process until process 0 tells it to stop or is gone.

    Args:
        index: Its number, from 1.
        listener: The listening socket, shared by all processes.
        channel_end: This end of a socket pair with process 0.
        loads: Open connections per process, shared.
    """
    end_with_parent()
    with StopSignals(second_is_at_once=False, says_so=False) as signals:  # process 0 says it
        set_up_logs(args, form=options.log_format)
        import_parser_plugins(args)
        following = _follow(args, options, index, listener, channel_end, (loads, index), signals)
        uvloop.run(signals.until_stopped(following))


async def _follow(
    args: Namespace,
    options: ServeOptions,
    index: int,
    listener: socket.socket,
    channel_end: socket.socket,
    loads: tuple[MutableSequence[int], int],
    signals: StopSignals,
) -> None:
    with contextlib.closing(listener), event_log_of(options, own_commit(), index) as event_log:
        signals.attend()
        engine_args = dataclasses.replace(
            parse_engine_args(args), _api_process_count=options.api_servers, _api_process_rank=index
        )
        board = Board()
        make_engine = _factories(engine_args, options, index, board)
        channel = await Channel[FromOwner].open(channel_end, FromOwner)
        follower = Follower(channel, board, make_engine, signals.stop, failure_of(event_log))
        tasks = [follower.spawn(follower.listen())]
        first_up = await follower.first_up()
        runtime = Runtime(
            {instance_id: make_engine(instance_id) for instance_id in first_up},
            make_policy(options, follows=True),
            metrics_with(event_log),
            origins=first_up,
            supervision=dataclasses.replace(
                supervision_of(options),
                hang_s=math.inf,  # process 0 finds out and tells
                backoff_first_s=REATTACH_S,
                backoff_max_s=REATTACH_S,
            ),
            migration=MigrationLimits.under_lease(options.kv_lease_s, precopy=True),
            observer=event_log,
            poison_deaths=options.poison_deaths,
        )
        log_stats, log_requests = not args.disable_log_stats, engine_args.enable_log_requests
        async with running_llm(runtime, log_stats=log_stats, log_requests=log_requests) as llm:
            follower.run(runtime)
            tasks.append(follower.spawn(follower.tell()))
            shared = SharedServing(follower, loads)
            await serve(
                llm,
                runtime,
                listener,
                args,
                signals,
                drain_timeout_s=options.drain_timeout_s,
                rules=rules_of(options),
                policy=options.policy_name(),
                is_first=False,
                shared=shared,
            )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _factories(
    engine_args: AsyncEngineArgs, options: ServeOptions, index: int, board: Board
) -> Callable[[InstanceId], Callable[[int], Engine]]:
    if options.fleet_name is None:
        return attached_factories(engine_args, index, board.attach)
    return followed_factories(engine_args, board.attach)
