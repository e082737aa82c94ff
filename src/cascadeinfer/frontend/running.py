"""vLLM's `AsyncLLM` on a runtime, from the start of both to their end."""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from cascadeinfer.core.types import InstanceId
from cascadeinfer.frontend.engine_client import CascadeLLM, make_llm
from cascadeinfer.frontend.start_report import reported
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0


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
