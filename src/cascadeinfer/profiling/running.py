"""Starts the engines that a profile is measured on."""

import asyncio
import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Final

from cascadeinfer.cluster.runtime_folder import runtime_folder
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.vllm.configuration import KvTransferSettings
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.launch import make_factories, parse_engine_args
from cascadeinfer.engines.vllm.plain_request import make_plain_request
from cascadeinfer.profiling.subject import Subject

STOP_TIMEOUT_S: Final = 5.0
LEASE_S: Final = 30
"""For measured pulls, whose blocks no other request waits for."""


@contextlib.asynccontextmanager
async def running_subjects(args: Namespace, n_instances: int) -> AsyncIterator[list[Subject]]:
    """
    Engines to profile, started and connected; stopped at the end.

    Raises:
        ConfigError: A vLLM option is wrong; nothing has been started.
        EngineError: An engine did not start.
    """
    names = tuple(str(i) for i in range(n_instances))
    settings = KvTransferSettings(lease_s=LEASE_S)
    factories = make_factories(parse_engine_args(args), names, settings, log_stats=False)
    engines = [make(0) for make in factories.values()]
    with runtime_folder():
        try:
            capacities = await asyncio.gather(*(engine.start() for engine in engines))
            for number, engine in enumerate(engines):
                await engine.connect(engines[:number])
            yield [await _subject(engine, capacity) for engine, capacity in zip(engines, capacities, strict=True)]
        finally:
            await asyncio.gather(*(engine.stop(STOP_TIMEOUT_S) for engine in engines), return_exceptions=True)


async def _subject(engine: VllmInstance, capacity: InstanceCapacity) -> Subject:
    told = await engine.identity()
    return Subject(
        engine=engine,
        capacity=capacity,
        max_model_tokens=engine.hello.max_model_len,
        identity=told.engine,
        kv_bytes_per_token=told.kv_bytes_per_token,
        make_request=make_plain_request,
        multiprocessors=told.multiprocessors,
        graph_tokens=told.graph_tokens,
    )
