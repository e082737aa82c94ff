"""The composition root: the only module that knows every layer."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import multiprocessing
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, MutableSequence
from multiprocessing.process import BaseProcess

import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.channel import Channel
from cascadeinfer.cluster.fleets import UsedFleet
from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.runtime_folder import runtime_folder
from cascadeinfer.config.event_log import event_log_of, metrics_with
from cascadeinfer.config.policy import make_policy
from cascadeinfer.config.ray_resources import custom_resources
from cascadeinfer.config.rules import rules_of
from cascadeinfer.config.running import check_running
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.config.supervision import supervision_of
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.placing.evacuation import MAX_MIGRATIONS_PER_INSTANCE
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.engines.vllm.configuration import KvTransferSettings, n_ranks
from cascadeinfer.engines.vllm.connector.orphan import end_with_parent
from cascadeinfer.engines.vllm.instance_logging import InstanceLogs
from cascadeinfer.engines.vllm.kept import KeptSource
from cascadeinfer.engines.vllm.launch import VllmSource, attached_factories, parse_engine_args
from cascadeinfer.engines.vllm.owned import attachment_of
from cascadeinfer.evaluation.compiling import say_when_compiling, stop_saying
from cascadeinfer.eventlog.unwritten_log import ServerLog, failure_of
from cascadeinfer.frontend.engine_client import CascadeLLM, make_llm
from cascadeinfer.frontend.fleet_engines import FleetEngines, FleetTerms, engines_of
from cascadeinfer.frontend.listening import listening, raise_open_files_limit
from cascadeinfer.frontend.logs import set_up_logs
from cascadeinfer.frontend.processes.board import Board
from cascadeinfer.frontend.processes.follower import Follower
from cascadeinfer.frontend.processes.messages import FromOwner
from cascadeinfer.frontend.processes.owner import NOT_ACCEPTING, FrontEnds
from cascadeinfer.frontend.server import (
    SharedServing,
    import_parser_plugins,
    serve,
    shared_metrics,
)
from cascadeinfer.frontend.standing_engines import StandingEngines
from cascadeinfer.frontend.start_report import first_line, reported
from cascadeinfer.frontend.stop_signals import StopSignals
from cascadeinfer.frontend.used_fleet import ray_terms, used_fleet
from cascadeinfer.results.provenance import own_commit
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
ATTACH_AGAIN_S = 5.0
"""Longest pause before an engine that stands on its own is tried again."""
REATTACH_S = 0.05
"""A follower waits for process 0 to report an instance up again, not for its own back-off."""


def make_runtime(
    engine_args: AsyncEngineArgs,
    options: ServeOptions,
    *,
    log_stats: bool = True,
    extra_environment: dict[str, str] | None = None,
    event_log: ServerLog | None = None,
    logs: InstanceLogs | None = None,
    standing: StandingEngines | None = None,
    fleet: FleetEngines | None = None,
) -> Runtime:
    """
    A runtime over vLLM instances, not started yet; over those that stand already or are a fleet's if they are given.

    Raises:
        ConfigError: An option is wrong; nothing has been started.
    """
    policy = make_policy(options)
    note = say_when_compiling(logger.info)
    POLICIES[options.policy_name()].warm_up()
    stop_saying(note)
    supervision, terms = supervision_of(options), options.terms()
    source: VllmSource | KeptSource | None = None
    make_engines: Mapping[InstanceId, Callable[[int], Engine]]
    if fleet is not None:
        source, make_engines = fleet.source, fleet.make_engines()
    elif standing is not None:
        make_engines = standing.make_engines(engine_args, options.kv_lease_s)
        supervision = dataclasses.replace(supervision, backoff_max_s=ATTACH_AGAIN_S)
    else:
        several = options.api_servers > 1
        if several:
            engine_args = dataclasses.replace(engine_args, _api_process_count=options.api_servers)
        source = VllmSource(
            engine_args,
            options.instances,
            KvTransferSettings(options.kv_lease_s, MAX_MIGRATIONS_PER_INSTANCE if several else None),
            log_stats=log_stats,
            extra_environment=extra_environment,
            n_clients=options.api_servers,
            logs=logs,
        )
        source.give_own(options.own_args())
        source.check_budgets(terms)
        make_engines = {instance_id: source.place(instance_id) for instance_id in options.instance_ids}
    return Runtime(
        make_engines,
        policy,
        metrics_with(event_log),
        supervision=supervision,
        migration=MigrationLimits.under_lease(options.kv_lease_s, precopy=True),
        source=source,
        observer=event_log,
        poison_deaths=options.poison_deaths,
        terms=terms if terms or standing is None else None,
    )


@contextlib.asynccontextmanager
async def running_llm(
    runtime: Runtime,
    *,
    log_stats: bool = True,
    log_requests: bool = False,
    stage: Callable[[InstanceId], str | None] | None = None,
) -> AsyncIterator[CascadeLLM]:
    """
    Start a runtime with vLLM's `AsyncLLM` on it; stop both at the end.

    Args:
        runtime: Not started yet.
        log_stats: Whether vLLM's metrics are kept.
        log_requests: Whether vLLM logs each request.
        stage: Says how far the start of an instance is, for the operator; None: nothing is said.
    """
    telling = contextlib.nullcontext() if stage is None else reported(runtime.fleet, stage, logger.info)
    async with telling:
        await runtime.start()
    try:
        # They serve the same model; a context fitted to one instance's memory may be shorter than another's.
        configs = [engine.config for engine in runtime.live_engines()]
        narrowest = min(configs, key=lambda config: config.model_config.max_model_len)
        llm = make_llm(runtime, narrowest, log_stats=log_stats, log_requests=log_requests)
        try:
            yield llm
        finally:
            llm.shutdown()
    finally:
        await runtime.stop(STOP_TIMEOUT_S)


async def run_server(args: Namespace, options: ServeOptions, signals: StopSignals) -> None:
    """
    `cascadeinfer serve`: bind the port, start the instances, serve until a signal, drain, stop.

    Args:
        signals: Taken over already.

    Raises:
        ConfigError: An option is wrong; nothing is left running.
    """
    raise_open_files_limit(options.max_connections)
    if args.otlp_traces_endpoint is not None:
        os.environ.setdefault("OTEL_SERVICE_NAME", "cascadeinfer")  # of the instances' processes, too
    prepared = parse_engine_args(args) if options.standby else None  # before it waits
    async with contextlib.AsyncExitStack() as stack:
        named = await stack.enter_async_context(_named_fleet(args, options))
        with signals.held():
            listener = stack.enter_context(listening(args.host or LOOPBACK, args.port, args.uds, signals.at_leave))
            folder = stack.enter_context(runtime_folder())
            signals.at_leave.append(folder.remove)
            event_log = stack.enter_context(event_log_of(options, own_commit()))
            if event_log is not None:
                signals.at_leave.append(event_log.close)
        logger.info("%s", first_line(args.model, options.instances, options.api_servers, options.cluster))
        engine_args = prepared or parse_engine_args(args)
        logs = InstanceLogs(args.own_log_level, is_quiet=args.is_quiet)
        log_stats, log_requests = not args.disable_log_stats, engine_args.enable_log_requests
        if options.api_servers > 1:
            with shared_metrics(folder.path / "metrics"):
                runtime = make_runtime(engine_args, options, log_stats=log_stats, event_log=event_log, logs=logs)
                signals.attend()
                await _serve_with_followers(
                    runtime, args, options, listener, signals, log_requests=log_requests, event_log=event_log, logs=logs
                )
            return
        standing = await _standing_engines(options)
        if standing is not None:
            options = dataclasses.replace(options, instances=len(standing.first))
        async with contextlib.AsyncExitStack() as until_end:
            if named is not None:
                signals.attend()  # engines may be started, or have been found
            fleet = await until_end.enter_async_context(engines_of(named, engine_args, _fleet_terms(args, options)))
            runtime = make_runtime(
                engine_args,
                options,
                log_stats=log_stats,
                event_log=event_log,
                logs=logs,
                standing=standing,
                fleet=fleet,
            )
            signals.attend()
            stage = logs.stage if fleet is None else fleet.stage
            llm = await until_end.enter_async_context(
                running_llm(runtime, log_stats=log_stats, log_requests=log_requests, stage=stage)
            )
            if standing is not None:
                await until_end.enter_async_context(standing.followed(runtime, options.drain_timeout_s))
            await check_running(runtime, options)  # before the start is over: a fleet's new engines end if it fails
            until_end.enter_context(contextlib.nullcontext() if fleet is None else fleet.serving())
            await serve(
                llm,
                runtime,
                listener,
                args,
                signals,
                drain_timeout_s=options.drain_timeout_s,
                rules=rules_of(options),
                policy=options.policy_name(),
            )


def _named_fleet(args: Namespace, options: ServeOptions) -> contextlib.AbstractAsyncContextManager[UsedFleet | None]:
    on_ray = None
    if options.cluster == "ray":
        others = custom_resources(options.ray_resources)
        address, host = options.ray_address, options.cluster_host
        on_ray = ray_terms(address, host, options.ray_cpus, options.ray_gpus, n_ranks(args), others)
    return used_fleet(options.fleet_name, wait=options.standby, on_ray=on_ray)


def _fleet_terms(args: Namespace, options: ServeOptions) -> FleetTerms:
    return FleetTerms(
        options.instances,
        options.kv_lease_s,
        options.orphan_timeout_s,
        log_stats=not args.disable_log_stats,
        own_log_level=args.own_log_level,
        own_host=options.cluster_host,
    )


async def _standing_engines(options: ServeOptions) -> StandingEngines | None:
    """The engines of `--cluster static`, once they answer."""
    if options.cluster != "static":
        return None
    assert options.engines is not None
    assert options.cluster_key is not None
    engines = StandingEngines(options.engines, options.cluster_key, options.cluster_host)
    await engines.find(None if options.stages is None else options.n_staged())
    return engines


async def _serve_with_followers(
    runtime: Runtime,
    args: Namespace,
    options: ServeOptions,
    listener: socket.socket,
    signals: StopSignals,
    *,
    log_requests: bool,
    event_log: ServerLog | None,
    logs: InstanceLogs,
) -> None:
    """Process 0 of several: start the others beside the instances, serve, drain all, stop."""
    spawn = multiprocessing.get_context("spawn")
    loads = spawn.RawArray("i", [NOT_ACCEPTING] * options.api_servers)

    def start_process(index: int, channel_end: socket.socket) -> BaseProcess:
        process = spawn.Process(
            target=run_follower,
            args=(args, options, index, listener, channel_end, loads),
            name=f"front-end-{index}",
        )
        with ProcessStart({}):
            process.start()
        return process

    front_ends = FrontEnds(options.api_servers, runtime, start_process, attachment_of, loads, failure_of(event_log))
    signals.told.append(front_ends.tell_stop)
    front_ends.start()
    try:
        log_stats = not args.disable_log_stats
        async with running_llm(runtime, log_stats=log_stats, log_requests=log_requests, stage=logs.stage) as llm:
            await check_running(runtime, options)
            front_ends.instances_started()
            shared = SharedServing(front_ends, (loads, 0))
            try:
                await serve(
                    llm,
                    runtime,
                    listener,
                    args,
                    signals,
                    drain_timeout_s=options.drain_timeout_s,
                    rules=rules_of(options),
                    policy=options.policy_name(),
                    shared=shared,
                )
            finally:
                await front_ends.stop(options.drain_timeout_s)
    finally:
        front_ends.tell_stop(at_once=True)
        await front_ends.stop(0.0)


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
        make_engine = attached_factories(engine_args, index, board.attach)
        channel = await Channel[FromOwner].open(channel_end, FromOwner)
        follower = Follower(channel, board, make_engine, signals.stop, failure_of(event_log))
        tasks = [follower.spawn(follower.listen())]
        first_up = await follower.first_up()
        runtime = Runtime(
            {instance_id: make_engine(instance_id) for instance_id in first_up},
            make_policy(options, follows=True),
            metrics_with(event_log),
            supervision=dataclasses.replace(
                supervision_of(options),
                hang_s=math.inf,  # process 0 finds out and tells
                backoff_first_s=REATTACH_S,
                backoff_max_s=REATTACH_S,
            ),
            migration=MigrationLimits.under_lease(options.kv_lease_s, precopy=True),
            observer=event_log,
            poison_deaths=options.poison_deaths,
            terms=options.terms() or None,
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
