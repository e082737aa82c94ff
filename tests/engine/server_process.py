"""`cascadeinfer serve` as a process, and what tests ask of it."""

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.runtime_folder import LOCK, NAME
from cascadeinfer.cluster.shared_memory import PREFIX, SHARED_MEMORY
from cascadeinfer.loadgen.served_process import ServedProcess
from conftest import QUICK_ENVIRONMENT

START_DEADLINE_S = 480.0
PIPES = "pipe:[*]"
"""The key for pipes in `open_files`; a process object has two."""
API_KEY = "sesame"
MODEL = "tiny"
QUICK_SERVER = (sys.executable, str(Path(__file__).parent / "quick_server.py"))
"""A server whose instances start in a second or two; for tests that start many."""
NO_TLS: dict[str, Any] = {"verify": False}
"""For every call without TLS: reading the certificates takes longer than the call."""
OTHERS_WORDS = re.compile(r"\((?:instance \S+ )?(?:EngineCore|Worker|VllmWorker)|.*\"(GET|POST|DELETE) ")
"""Log lines that are not the front end's own."""


class ServerProcess(ServedProcess):
    """A real server on a free port: two instances, two stages, an API key."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *arguments: str,
        program: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `cascadeinfer`, or the program named, with these variables added to those of quick tests."""
        port = free_port()
        words = ["serve", str(model), "--host", LOOPBACK, "--port", str(port), "--served-model-name", MODEL]
        words += ["--instances", "2", "--stages", "0-64:1,64-:1", "--api-key", API_KEY, "--report-interval-s", "0.02"]
        words += ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--num-gpu-blocks-override", "256"]
        words += ["--max-model-len", "1024", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        super().__init__(
            [*(program or (str(Path(sys.executable).parent / "cascadeinfer"),)), *words, *arguments],
            port=port,
            log=log,
            environment={**QUICK_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})},
            stop_timeout_s=60.0,
            children_timeout_s=20.0,
        )

    def wait_until_ready(self, n_instances: int = 2) -> None:
        """Wait until `/health/ready` reports all instances."""
        self.poll(lambda: len(self.get("/health/ready").json()["instances"]) == n_instances, "ready", START_DEADLINE_S)

    def poll(self, condition: Callable[[], object], what: str, deadline_s: float = 120.0) -> None:
        """Wait until the condition holds; a refused connection does not count as an answer."""

        def holds() -> bool:
            try:
                return bool(condition())
            except (httpx.TransportError, KeyError):
                return False

        self.wait_until(holds, what, deadline_s, poll_s=0.05)

    def log_tail(self, n_lines: int = 60) -> str:
        """The end of the log without the engines' output and the access log."""
        lines = [line for line in self.log.read_text().splitlines() if not OTHERS_WORDS.match(line)]
        return "\n".join(line[:300] for line in lines[-n_lines:])

    def client(self, timeout_s: float) -> httpx.AsyncClient:
        """For many requests at once, each over a connection of its own, with the API key."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers=_bearer(API_KEY),
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            **NO_TLS,
        )

    def get(self, path: str, *, key: str | None = API_KEY) -> httpx.Response:
        """A GET with the API key."""
        return httpx.get(self.url + path, headers=_bearer(key), timeout=60, **NO_TLS)

    def post(self, path: str, content: Any, *, key: str | None = API_KEY, timeout_s: float = 120.0) -> httpx.Response:
        """A POST of JSON (or of bytes as they are) with the API key."""
        headers = {**_bearer(key), "content-type": "application/json"}
        body = {"content": content} if isinstance(content, bytes) else {"json": content}
        return httpx.post(self.url + path, headers=headers, timeout=timeout_s, **body, **NO_TLS)

    def delete(self, path: str, *, key: str | None = API_KEY) -> httpx.Response:
        """A DELETE with the API key."""
        return httpx.delete(self.url + path, headers=_bearer(key), timeout=60, **NO_TLS)

    def admin(self) -> dict[str, Any]:
        """`/admin/instances`."""
        return self.get("/admin/instances").json()

    @contextlib.contextmanager
    def viewer(self) -> Iterator[Iterator[dict[str, Any]]]:
        """What a viewer of the operator's page gets: an iterator over pictures, until the server ends the stream."""
        url, headers = f"{self.url}/admin/events", _bearer(API_KEY)
        with httpx.stream("GET", url, headers=headers, timeout=60, **NO_TLS) as answer:
            assert answer.status_code == 200
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            yield (json.loads(line.removeprefix("data: ")) for line in lines)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, from `/metrics`."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if match is None:
                continue
            found = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
            if labels.items() <= found.items():
                total += float(match[2])
        return total

    def resources(self) -> dict[str, int]:
        """
        Resource counts: the server's child processes, ZMQ threads, open files and listening ports, and the machine's
        shared memory.

        Other threads do not count: Python's executor starts some of its few only when they are first needed.
        """
        own = psutil.Process(self.pid)
        names = [Path(f"/proc/{own.pid}/task/{thread.id}/comm").read_text() for thread in own.threads()]
        return {
            "processes": len(own.children(recursive=True)),
            "zmq threads": sum("ZMQ" in name for name in names),
            "files": own.num_fds(),
            "ports": sum(c.status == psutil.CONN_LISTEN for c in own.net_connections(kind="inet")),
            "shared memory": len(list(SHARED_MEMORY.glob(f"{PREFIX}*"))),
        }

    def folder(self) -> Path:
        """The server's own folder, whose lock it has open."""
        links = [link.readlink() for link in Path(f"/proc/{self.pid}/fd").iterdir() if link.is_symlink()]
        [folder] = [link.parent for link in links if link.name == LOCK and NAME.fullmatch(link.parent.name)]
        return folder

    def open_files(self) -> Counter[str]:
        """The server's own open files by kind: the path without numbers, so that a leak shows where it comes from."""
        kinds: Counter[str] = Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                kinds[re.sub(r"[0-9a-f-]*[0-9][0-9a-f-]*", "*", str(link.readlink()))] += 1
        return kinds

    def idle(self) -> bool:
        """Whether no instance holds anything and all are up."""
        seen = self.admin()
        held = ("running", "waiting", "kv_blocks_used", "pinned", "reserved", "requests")
        return seen["requests"]["live"] == 0 and all(
            instance["up"] and not any(instance[name] for name in held) for instance in seen["instances"]
        )


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
