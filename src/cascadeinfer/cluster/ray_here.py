"""
A Ray cluster of one node on this machine, for trying it out (`cascadeinfer cluster up`), with a token.

    BASE/cascadeinfer-ray-UID/      0700, ours
        head                        address and process of the node that runs, if one does
        token                       Ray's token
        log                         what `ray start` says
        ray/                        Ray's own folder
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec
import psutil

from cascadeinfer.cluster.fleet import make_ours
from cascadeinfer.cluster.keeping import read_json, write_whole
from cascadeinfer.cluster.local import free_port
from cascadeinfer.cluster.ray_link import RECONNECT_S, RECONNECT_VARIABLE
from cascadeinfer.core.errors import ConfigError

DEFAULT_PORT: Final = 6379
WORKER_PORTS: Final = range(10002, 20000)
"""Ray gives these to its workers; a head that listens on one of them disturbs them."""
START_TIMEOUT_S: Final = 300.0
END_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.2
STORE_BYTES: Final = 100_000_000
"""For Ray's objects; nothing large is one."""
STARTED: Final = "Ray runtime started"
SETTINGS: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    RECONNECT_VARIABLE: RECONNECT_S,
}


class Head(msgspec.Struct, frozen=True):
    """
    The node that runs.

    Attributes:
        address: HOST:PORT.
        pid: Of `ray start`, which lasts as long as the node.
        born_s: When that process began; distinguishes it from a later one with this id.
    """

    address: str
    pid: int
    born_s: float


def need_ray() -> None:
    """Raises ModuleNotFoundError if Ray is not installed; it is not imported."""
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")


def folder_of(base: Path | None = None) -> Path:
    """See the module header."""
    return (base or Path(tempfile.gettempdir())) / f"cascadeinfer-ray-{os.geteuid()}"


def head(base: Path | None = None) -> Head | None:
    """The node that `up` has started, if it runs."""
    try:
        told: Head = read_json(folder_of(base) / "head", Head)
        runs = psutil.Process(told.pid)
        return told if runs.create_time() == told.born_s and runs.status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, PermissionError, psutil.NoSuchProcess, msgspec.MsgspecError):
        return None


def found_address(said: str | None) -> str | None:
    """
    The address of the cluster: as said, else `RAY_ADDRESS`, else that of the node that `up` has started, whose token
    this process then uses; None: Ray looks for one on this machine.
    """
    said = said or os.environ.get("RAY_ADDRESS")
    ours = head()
    if ours is not None and said in {None, "auto", ours.address}:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(folder_of() / "token"))
        return ours.address
    return None if said == "auto" else said


def up(host: str, port: int, n_cpus: int | None, n_gpus: int | None, base: Path | None = None) -> Head:
    """
    Start the node.

    Args:
        host: This machine's address.
        port: Of the head.
        n_cpus: As Ray counts them; None: the machine's.
        n_gpus: Likewise.
        base: See the module header.

    Raises:
        ConfigError: One runs already, the port cannot be used, or Ray does not start.
    """
    need_ray()
    if (runs := head(base)) is not None:
        raise ConfigError(f"one runs already at {runs.address}", fix="cascadeinfer cluster down")
    if port in WORKER_PORTS:
        raise ConfigError(
            f"{port} is one of the ports of Ray's workers",
            option="--port",
            fix=f"below {WORKER_PORTS.start} or above {WORKER_PORTS.stop - 1}",
        )
    _check_port(host, port)
    folder = folder_of(base)
    make_ours(folder)
    token = folder / "token"
    if not token.exists():
        write_whole(token, secrets.token_hex(32).encode())
    words = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    words += [
        "--disable-usage-stats",
        f"--object-store-memory={STORE_BYTES}",
        f"--temp-dir={folder / 'ray'}",
        "--block",
    ]
    words += [] if n_cpus is None else [f"--num-cpus={n_cpus}"]
    words += [] if n_gpus is None else [f"--num-gpus={n_gpus}"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "ray.scripts.scripts", "start", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token)},
            start_new_session=True,
        )
    told = Head(f"{host}:{port}", process.pid, psutil.Process(process.pid).create_time())
    try:
        _wait_until_started(process, log)
    except BaseException:
        _end(told)
        raise
    write_whole(folder / "head", msgspec.json.encode(told))
    return told


def free_head_port() -> int:
    """A port on which a head can listen."""
    while (port := free_port()) in WORKER_PORTS:
        pass
    return port


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", option="--host, --port") from error


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while STARTED not in (said := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline_s:
            lines = [line for line in said.splitlines() if line.strip()]
            raise ConfigError(
                f"Ray does not start: {lines[-1].strip() if lines else 'it says nothing'} (its log: {log})"
            )
        time.sleep(POLL_S)


def down(base: Path | None = None) -> Head:
    """
    End the node and everything on it.

    Raises:
        ConfigError: None runs.
    """
    runs = head(base)
    if runs is None:
        raise ConfigError("no Ray runs here that `cascadeinfer cluster up` has started")
    _end(runs)
    folder = folder_of(base)
    (folder / "head").unlink(missing_ok=True)
    shutil.rmtree(folder / "ray", ignore_errors=True)
    return runs


def _end(told: Head) -> None:
    """End `ray start` and all that it has started; engines end with the workers that keep them."""
    try:
        first = psutil.Process(told.pid)
        below = first.children(recursive=True)
        first.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs([first, *below], timeout=END_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)


def own_address() -> str:
    """The address by which others reach this machine; the loopback's where there is no way out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of no machine: nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
