"""The composition root: the only module that knows every layer."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping
from multiprocessing.process import BaseProcess

from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.fleets import UsedFleet
from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.runtime_folder import RuntimeFolder, runtime_folder
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
from cascadeinfer.engines.vllm.attachment import attachment_of
from cascadeinfer.engines.vllm.configuration import KvTransferSettings, n_ranks
from cascadeinfer.engines.vllm.instance_logging import InstanceLogs
from cascadeinfer.engines.vllm.kept import KeptSource
from cascadeinfer.engines.vllm.launch import VllmSource, parse_engine_args
from cascadeinfer.evaluation.compiling import say_when_compiling, stop_saying
from cascadeinfer.eventlog.unwritten_log import ServerLog, failure_of
from cascadeinfer.following import run_follower
from cascadeinfer.frontend.fleet_engines import FleetEngines, FleetTerms, engines_of
from cascadeinfer.frontend.listening import listening, raise_open_files_limit, until_let_go
from cascadeinfer.frontend.processes.owner import NOT_ACCEPTING, FrontEnds
from cascadeinfer.frontend.running import running_llm
from cascadeinfer.frontend.server import (
    SharedServing,
    serve,
    shared_metrics,
)
from cascadeinfer.frontend.standing_engines import StandingEngines
from cascadeinfer.frontend.start_report import first_line
from cascadeinfer.frontend.stop_signals import StopSignals
from cascadeinfer.frontend.used_fleet import ray_terms, used_fleet
from cascadeinfer.results.provenance import own_commit
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

ATTACH_AGAIN_S = 5.0
"""Longest pause before an engine that stands on its own is tried again."""


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
        if options.standby:
            await until_let_go(args.host or LOOPBACK, args.port, args.uds)
        listener, folder, event_log = _bound(args, options, signals, stack)
        logger.info("%s", first_line(args.model, options.instances, options.api_servers, options.cluster))
        engine_args = prepared or parse_engine_args(args)
        logs = InstanceLogs(args.own_log_level, is_quiet=args.is_quiet)
        log_stats, log_requests = not args.disable_log_stats, engine_args.enable_log_requests
        if options.api_servers > 1:
            stack.enter_context(shared_metrics(folder.path / "metrics"))
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
            front_ends = await until_end.enter_async_context(
                _with_followers(runtime, args, options, listener, signals, event_log)
            )
            stage = logs.stage if fleet is None else fleet.stage
            llm = await until_end.enter_async_context(
                running_llm(runtime, log_stats=log_stats, log_requests=log_requests, stage=stage)
            )
            if standing is not None:
                await until_end.enter_async_context(standing.followed(runtime, options.drain_timeout_s))
            await check_running(runtime, options)  # before the start is over: a fleet's new engines end if it fails
            until_end.enter_context(contextlib.nullcontext() if fleet is None else fleet.serving())
            if front_ends is not None:
                front_ends.instances_started()
                until_end.push_async_callback(front_ends.stop, options.drain_timeout_s)
            await serve(
                llm,
                runtime,
                listener,
                args,
                signals,
                drain_timeout_s=options.drain_timeout_s,
                rules=rules_of(options),
                policy=options.policy_name(),
                shared=None if front_ends is None else SharedServing(front_ends, (front_ends.loads, 0)),
            )


def _bound(
    args: Namespace, options: ServeOptions, signals: StopSignals, stack: contextlib.AsyncExitStack
) -> tuple[socket.socket, RuntimeFolder, ServerLog | None]:
    """The listening socket, the server's folder and its event log, until the end of the stack or of the process."""
    with signals.held():
        listener = stack.enter_context(listening(args.host or LOOPBACK, args.port, args.uds, signals.at_leave))
        folder = stack.enter_context(runtime_folder())
        signals.at_leave.append(folder.remove)
        event_log = stack.enter_context(event_log_of(options, own_commit()))
        if event_log is not None:
            signals.at_leave.append(event_log.close)
    return listener, folder, event_log


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
        n_front_ends=options.api_servers,
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


@contextlib.asynccontextmanager
async def _with_followers(
    runtime: Runtime,
    args: Namespace,
    options: ServeOptions,
    listener: socket.socket,
    signals: StopSignals,
    event_log: ServerLog | None,
) -> AsyncIterator[FrontEnds | None]:
    """In this context, process 0 of several has the others start beside the instances; none if it is the only one."""
    if options.api_servers == 1:
        yield None
        return
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
        yield front_ends
    finally:
        front_ends.tell_stop(at_once=True)
        await front_ends.stop(0.0)
