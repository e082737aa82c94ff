"""A front end of a Ray cluster on the machines of `ray_machines.py`, and what tests ask of it."""

import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_machines import ENVIRONMENT, Machines, why_not
from server_process import API_KEY, MODEL, QUICK_SERVER, ServerProcess

from conftest import QUICK_ENVIRONMENT

FLEET = "three-machines"
READY_DEADLINE_S = 600.0
TRIES = 10
ENVIRONMENT_OF_ALL = {**ENVIRONMENT, "UCX_TLS": "tcp,self"}
RAY_ENVIRONMENT = {**QUICK_ENVIRONMENT, **ENVIRONMENT_OF_ALL}


def machines_with_ray(
    folder: Path, n_nodes: int, config: pytest.Config, *, engines_per_node: int = 1
) -> Iterator[Machines]:
    """For a fixture: a head and nodes, with Ray on each. Skips the test where that is not wanted or cannot be."""
    if not config.getoption("--ray"):
        pytest.skip("make test-ray runs it")
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Machines(folder, n_nodes, engines_per_node).up() as machines:
        for number in range(n_nodes + 1):
            machines.start_ray(number, RAY_ENVIRONMENT)
        yield machines


class RayServer(ServerProcess):
    """A front end on the head's machine, over a Unix socket, because this process is not in its network."""

    def __init__(self, machines: Machines, model: Path, name: str, *arguments: str) -> None:
        """Not started yet."""
        self._socket = machines.folder / f"{name}.sock"
        words = [
            "--uds",
            str(self._socket),
            "--cluster",
            "ray",
            "--fleet",
            FLEET,
            "--kv-cache-memory-bytes",
            "268435456",
        ]
        words += ["--ray-address", machines.ray_address, "--cluster-host", machines.address(0)]
        super().__init__(
            model,
            machines.folder / f"{name}.log",
            *words,
            *arguments,
            program=machines.on(0, QUICK_SERVER),
            environment={
                **ENVIRONMENT_OF_ALL,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_LOGGING_LEVEL": "INFO",  # a server that stands by says so
            },
        )

    def client(self, timeout_s: float) -> httpx.AsyncClient:
        """See ServerProcess."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(
            base_url="http://server",
            headers={"Authorization": f"Bearer {API_KEY}"},
            timeout=timeout_s,
            transport=httpx.AsyncHTTPTransport(uds=str(self._socket), limits=limits),
        )

    def _ask(self, method: str, path: str, timeout_s: float = 120.0, **more: Any) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(self._socket))
        with httpx.Client(transport=transport, base_url="http://server", timeout=timeout_s) as client:
            return client.request(method, path, headers={"Authorization": f"Bearer {API_KEY}"}, **more)

    def get(self, path: str, *, key: str | None = API_KEY) -> httpx.Response:  # noqa: ARG002 - see above
        """See ServerProcess."""
        return self._ask("GET", path)

    def post(
        self,
        path: str,
        content: Any,
        *,
        key: str | None = API_KEY,  # noqa: ARG002 - see above
        timeout_s: float = 120.0,
    ) -> httpx.Response:
        """See ServerProcess."""
        return self._ask("POST", path, timeout_s, json=content)

    def delete(self, path: str, *, key: str | None = API_KEY) -> httpx.Response:  # noqa: ARG002 - see above
        """See ServerProcess."""
        return self._ask("DELETE", path)

    def tokens(self, prompt: list[int], n_tokens: int) -> list[int]:
        """The answer, which is the same wherever it is computed."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert answer.status_code == HTTPStatus.OK, answer.text
        return list(answer.json()["choices"][0]["token_ids"])

    def stream(self, prompt: list[int], n_tokens: int) -> Iterator[int]:
        """The same token by token, as they come; the stream must end properly."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        transport = httpx.HTTPTransport(uds=str(self._socket))
        with (
            httpx.Client(transport=transport, base_url="http://server", timeout=300.0) as client,
            client.stream(
                "POST",
                "/v1/completions",
                json={**body, "stream": True, "return_token_ids": True},
                headers={"Authorization": f"Bearer {API_KEY}"},
            ) as answer,
        ):
            assert answer.status_code == HTTPStatus.OK, answer.read()
            last = ""
            for line in answer.iter_lines():
                last = line or last
                if line.startswith("data: {"):
                    part = json.loads(line.removeprefix("data: "))
                    assert "error" not in part, part
                    yield from part["choices"][0]["token_ids"] or ()
            assert last == "data: [DONE]", last

    def moved(self) -> float:
        """Requests that this front end has handed over with their KV cache."""
        return self.metric("cascadeinfer_migrations_total", outcome="moved")

    def that_moved(self, n_tokens: int) -> tuple[list[int], list[int]]:
        """
        A prompt of the first stage and its answer, which has moved.

        On a busy machine nobody may have taken it in time; the next try has another prompt, because an instance that
        remembers one gets it again.
        """
        for number in range(TRIES):
            before = self.moved()
            prompt = [3 + (7 * i + 31 * number) % 200 for i in range(37)]
            tokens = self.tokens(prompt, n_tokens)
            if self.moved() > before:
                return prompt, tokens
        raise AssertionError(f"in {TRIES} tries no request has moved")

    def pids(self) -> dict[str, int]:
        """Of the engines."""
        return {instance["id"]: instance["pid"] for instance in self.admin()["instances"]}

    def n_running(self, instance_id: str) -> int:
        """Requests on an instance."""
        [instance] = [each for each in self.admin()["instances"] if each["id"] == instance_id]
        return int(instance["running"])


def both_up(server: RayServer, n_instances: int = 2) -> None:
    """Wait until all instances take requests."""

    def all_are() -> bool:
        return len(server.get("/health/ready").json()["instances"]) == n_instances

    server.poll(all_are, "ready", READY_DEADLINE_S)
