"""The composition root: the only module that knows every layer."""

import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.policy import Policy
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.launch import KvTransferSettings, VllmSource, parse_engine_args
from cascadeinfer.evaluation.provenance import commit_of
from cascadeinfer.frontend.engine_client import CascadeLLM, make_llm
from cascadeinfer.frontend.server import StopSignals, bind, serve
from cascadeinfer.observe.event_log import EventLog, header_of
from cascadeinfer.runtime.metrics import InstanceGauges, RuntimeMetrics
from cascadeinfer.runtime.migrate import MigrationTimes
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.supervise import SupervisionTimes

POLICIES_WITH_STAGES = ("cascade", "static_length", "static_stages")
"""Policies that take a layout; without `--stages` it is one stage."""
LEASE_MARGIN_S = 3.0
"""A pull must be over this long before the lease ends: clocks, a slow step, a late message."""
STOP_TIMEOUT_S = 5.0


def policy_spec(options: ServeOptions) -> PolicySpec:
    """
    What makes the policy that the options name.

    Raises:
        ConfigError: Stages are given to a policy that has none.
    """
    name = options.policy_name()
    layout = options.layout()
    if name in POLICIES_WITH_STAGES:
        return PolicySpec(name, {"layout": layout})
    if options.stages is not None:
        raise ConfigError(
            f"policy {name} has no stages",
            option="--stages",
            fix=f"leave it out, or use --policy {' or '.join(POLICIES_WITH_STAGES)}",
        )
    return PolicySpec(name)


def make_policy(options: ServeOptions) -> Policy:
    """
    The policy that the options name.

    Raises:
        ConfigError: Stages are given to a policy that has none.
    """
    return policy_spec(options).make()


@contextlib.contextmanager
def event_log_of(options: ServeOptions) -> Iterator[EventLog | None]:
    """
    The event log that the options ask for, until the server has stopped; None when they ask for none.

    Raises:
        ConfigError: It cannot be written.
    """
    if options.event_log is None:
        yield None
        return
    header = header_of(
        policy_spec(options),
        source="runtime",
        instances=options.instance_ids,
        commit=commit_of(Path(__file__).parent / "evaluation"),
    )
    path = Path(options.event_log)
    log = EventLog(path, header, max_bytes=options.event_log_mb * 1_000_000, files=options.event_log_files)
    try:
        yield log
    finally:
        log.close()


def make_runtime(
    engine_args: AsyncEngineArgs,
    options: ServeOptions,
    *,
    log_stats: bool = True,
    extra_environment: dict[str, str] | None = None,
    event_log: EventLog | None = None,
) -> Runtime:
    """
    A runtime over vLLM instances, not started yet.

    Raises:
        ConfigError: An option is wrong; nothing has been started.
    """
    policy = make_policy(options)
    source = VllmSource(
        engine_args,
        options.instances,
        KvTransferSettings(lease_s=options.kv_lease_s),
        log_stats=log_stats,
        extra_environment=extra_environment,
    )

    def make_metrics(read: Callable[[], list[InstanceGauges]]) -> RuntimeMetrics:
        return RuntimeMetrics(REGISTRY, read, lambda: 0 if event_log is None else event_log.dropped)

    return Runtime(
        {instance_id: source.place(instance_id) for instance_id in options.instance_ids},
        policy,
        make_metrics,
        supervision=SupervisionTimes(report_s=options.report_interval_s, hang_s=options.hang_timeout_s),
        migration=MigrationTimes(resume_s=options.kv_lease_s - LEASE_MARGIN_S),
        source=source,
        observer=event_log,
    )


@contextlib.asynccontextmanager
async def running_llm(
    runtime: Runtime, *, log_stats: bool = True, log_requests: bool = False
) -> AsyncIterator[CascadeLLM]:
    """Start a runtime and put vLLM's `AsyncLLM` on it; stop both at the end."""
    await runtime.start()
    try:
        first = runtime.live_engines()[0]
        assert isinstance(first, VllmInstance)
        llm = make_llm(runtime, first.vllm_config, log_stats=log_stats, log_requests=log_requests)
        try:
            yield llm
        finally:
            llm.shutdown()
    finally:
        await runtime.stop(STOP_TIMEOUT_S)


async def run_server(args: Namespace, options: ServeOptions) -> None:
    """
    `cascadeinfer serve`: bind the port, start the instances, serve until a signal, drain, stop.

    Raises:
        ConfigError: An option is wrong; nothing is left running.
    """
    with (
        contextlib.closing(bind(args.host or LOOPBACK, args.port)) as listener,
        StopSignals() as signals,
        event_log_of(options) as event_log,
    ):
        engine_args = parse_engine_args(args)
        log_stats = not args.disable_log_stats
        runtime = make_runtime(engine_args, options, log_stats=log_stats, event_log=event_log)
        async with running_llm(runtime, log_stats=log_stats, log_requests=engine_args.enable_log_requests) as llm:
            await serve(llm, runtime, listener, args, signals, drain_timeout_s=options.drain_timeout_s)
