"""
Machines for the tests of a Ray cluster: network namespaces with a shared memory and a /tmp/ray of their own, joined by
a bridge. The first one has the cluster's head and the front end, the others are nodes with room for one engine or more.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cascadeinfer.loadgen.served_process import ServedProcess

NETWORK = "10.77.1"
HEAD_PORT = 26379
ATTEMPTS = 5
TOKEN = "0123456789abcdef" * 3
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_prestart_python_workers": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}
QUICK = ["--disable-usage-stats", "--object-store-memory=80000000", "--include-log-monitor=false", "--block"]
"""Without what is not needed here. The ports are the same on all machines: each has a network of its own."""
PORTS = ["--min-worker-port=19500", "--max-worker-port=19899", "--dashboard-agent-listen-port=19311"]
PORTS += ["--dashboard-agent-grpc-port=19312", "--metrics-export-port=19313", "--runtime-env-agent-port=19314"]


def why_not() -> str | None:
    """Why there can be no machines of this kind here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"cascade-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            return f"this kernel makes no network namespaces: {made.stderr.strip()}"
        linked = _ip("-n", name, "link", "add", "cascade0", "type", "bridge")
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    except FileNotFoundError:
        return "the command ip is not installed"
    return None if linked.returncode == 0 else f"this kernel makes no bridges: {linked.stderr.strip()}"


def _ip(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def _must(*words: str) -> None:
    done = _ip(*words)
    assert done.returncode == 0, (words, done.stderr)


class Machines:
    """
    A head and nodes, the head is number 0.

    Attributes:
        folder: For logs and for each machine's /tmp/ray.
    """

    def __init__(self, folder: Path, n_nodes: int, engines_per_node: int = 1) -> None:
        """Nothing is made yet."""
        self._engines_per_node = engines_per_node
        self.folder = folder
        self.names = [f"cascade{os.getpid()}m{number}" for number in range(n_nodes + 1)]
        self.rays: dict[int, ServedProcess] = {}

    def address(self, number: int) -> str:
        """Of a machine."""
        return f"{NETWORK}.{number + 1}"

    @property
    def ray_address(self) -> str:
        """Of the cluster's head."""
        return f"{self.address(0)}:{HEAD_PORT}"

    @contextmanager
    def up(self) -> Iterator["Machines"]:
        """In this context the networks exist."""
        head = self.names[0]
        try:
            for name in self.names:
                _must("netns", "add", name)
                _must("-n", name, "link", "set", "lo", "up")
            _must("-n", head, "link", "add", "br0", "type", "bridge")
            _must("-n", head, "addr", "add", f"{self.address(0)}/24", "dev", "br0")
            _must("-n", head, "link", "set", "br0", "up")
            for number, name in enumerate(self.names[1:], 1):
                _must("-n", head, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
                _must("-n", head, "link", "set", f"v{number}", "master", "br0", "up")
                _must("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
                _must("-n", name, "link", "set", "eth0", "up")
                _must("-n", name, "route", "add", "default", "via", self.address(0))
            yield self
        finally:
            for ray in self.rays.values():
                kill_session(ray.pid)
            for number, name in enumerate(self.names):
                for pid in self.pids(number):
                    _kill(pid)
                _ip("netns", "del", name)

    def on(self, number: int, words: Sequence[str]) -> list[str]:
        """A command on a machine; its host name is in no file, so it is looked up as the address it is."""
        own = self.folder / f"ray{number}"
        own.mkdir(exist_ok=True)
        hosts = self.folder / f"hosts{number}"
        hosts.write_text(f"127.0.0.1 localhost\n{self.address(number)} machine{number}\n")
        prepare = (
            f"set -e; hostname machine{number}; mount -t tmpfs none /dev/shm; mkdir -p /tmp/ray; "
            f'mount --bind {own} /tmp/ray; mount --bind {hosts} /etc/hosts; exec "$@"'
        )
        own_system = ["ip", "netns", "exec", self.names[number], "unshare", "--mount", "--uts"]
        return [*own_system, "bash", "-c", prepare, "bash", *words]

    def start_ray(self, number: int, environment: Mapping[str, str]) -> None:
        """
        Start Ray on a machine and wait until it runs.

        Ray gives its own helpers 15 seconds to start and then ends, which a busy machine needs some attempts to meet.
        """
        words = [f"--node-ip-address={self.address(number)}", "--num-gpus=0", *PORTS, *QUICK]
        if number == 0:
            words += ["--head", f"--port={HEAD_PORT}", "--include-dashboard=false", "--num-cpus=0"]
        else:
            words += [f"--address={self.ray_address}", f"--num-cpus={self._engines_per_node}"]
        log = self.folder / f"ray{number}.log"
        for _ in range(ATTEMPTS):
            command = self.on(number, [sys.executable, "-m", "ray.scripts.scripts", "start", *words])
            ray = ServedProcess(command, port=HEAD_PORT, log=log, name=f"Ray {number}", environment=environment)
            ray.start()
            self.rays[number] = ray
            ray.wait_until(lambda: self._runs(number) or self._was_too_slow(number), "Ray runs", 300.0)
            if self._runs(number):
                return
            kill_session(ray.pid)
            for pid in self.pids(number):
                _kill(pid)
            shutil.rmtree(self.folder / f"ray{number}", ignore_errors=True)
        pytest.skip(f"this machine is too busy for Ray: {ATTEMPTS} times its helpers did not start in 15 seconds")

    def _runs(self, number: int) -> bool:
        return "Ray runtime started" in (self.folder / f"ray{number}.log").read_text()

    def _was_too_slow(self, number: int) -> bool:
        errors = (self.folder / f"ray{number}").glob("session_2*/logs/raylet.err")
        return any("Timed out waiting for file" in error.read_text() for error in errors)

    def link_bytes(self) -> dict[int, int]:
        """Bytes that each node has sent and got so far."""
        return {number: self._bytes_of(number) for number in range(1, len(self.names))}

    def _bytes_of(self, number: int) -> int:
        said = _ip("-n", self.names[0], "-s", "-s", "-j", "link", "show", f"v{number}").stdout
        stats = json.loads(said)[0]["stats64"]
        return int(stats["rx"]["bytes"] + stats["tx"]["bytes"])

    def pids(self, number: int) -> list[int]:
        """Of all processes on a machine."""
        said = _ip("netns", "pids", self.names[number]).stdout
        return [int(word) for word in said.split()]

    def number_of(self, pid: int) -> int:
        """The machine on which a process runs."""
        [number] = [number for number in range(len(self.names)) if pid in self.pids(number)]
        return number

    def process(self, number: int, name: str) -> psutil.Process:
        """The only process of this name on a machine."""
        [found] = [each for each in map(psutil.Process, self.pids(number)) if each.name() == name]
        return found

    def n_deaths(self, number: int) -> int:
        """How often the head has declared a node dead."""
        words = f"address: {self.address(number)} and node name"
        logs = (self.folder / "ray0").glob("session_2*/logs/gcs_server.out")
        return sum(log.read_text().count(words) for log in logs)

    @contextmanager
    def unplugged(self, number: int) -> Iterator[None]:
        """In this context a node has no network; nothing there is told so."""
        _must("-n", self.names[0], "link", "set", f"v{number}", "down")
        try:
            yield
        finally:
            _must("-n", self.names[0], "link", "set", f"v{number}", "up")

    @contextmanager
    def apart(self, one: int, other: int) -> Iterator[None]:
        """In this context two nodes cannot reach each other, although everybody else reaches both."""
        hole = ("blackhole", f"{self.address(other)}/32")
        _must("-n", self.names[one], "route", "add", *hole)
        try:
            yield
        finally:
            _must("-n", self.names[one], "route", "del", *hole)

    def kill_node(self, number: int) -> None:
        """Kill all processes of a machine."""
        del self.rays[number]
        for pid in self.pids(number):
            _kill(pid)


def kill_session(pid: int) -> None:
    """Kill a process and all below it."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for each in (pid, *(process.pid for process in below)):
        _kill(each)
    psutil.wait_procs(below, timeout=20)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
