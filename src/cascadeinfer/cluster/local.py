"""
Instances as processes of this machine: which cores, devices and ports each one gets.

An instance's settings reach vLLM through environment variables that its processes inherit when they are started. `ProcessStart` sets
them for the moment of the start only, under a lock, so that several instances can start in parallel without seeing each other's.
"""

import os
import socket
import threading
from collections.abc import Mapping, Sequence

from cascadeinfer.core.errors import ConfigError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def split_cores(n_instances: int, cores: Sequence[int]) -> list[str]:
    """
    Cores per instance in vLLM's notation (`VLLM_CPU_OMP_THREADS_BIND`), e.g. `0-3`, `4-7`.

    With fewer cores than instances, instances share cores in turn; left-over cores stay free for the front end.
    """
    if not cores:
        raise ConfigError("this process may run on no core", option="CPU affinity")
    if len(cores) < n_instances:
        return [str(cores[i % len(cores)]) for i in range(n_instances)]
    each = len(cores) // n_instances
    return [",".join(str(core) for core in cores[i * each : (i + 1) * each]) for i in range(n_instances)]


def split_devices(n_instances: int, devices_per_instance: int, visible: Sequence[str]) -> list[str]:
    """
    `CUDA_VISIBLE_DEVICES` per instance.

    Raises:
        ConfigError: There are fewer devices than the instances need, and not exactly one to share.
    """
    needed = n_instances * devices_per_instance
    if len(visible) >= needed:
        return [
            ",".join(visible[i * devices_per_instance : (i + 1) * devices_per_instance]) for i in range(n_instances)
        ]
    if len(visible) == 1 and devices_per_instance == 1:
        return [visible[0]] * n_instances  # instances share one device: lower --gpu-memory-utilization
    enough_for = len(visible) // devices_per_instance
    raise ConfigError(
        f"{n_instances} instances of {devices_per_instance} device(s) need {needed} devices, {len(visible)} are visible",
        option="--instances",
        fix=f"{f'use --instances {enough_for} or ' if enough_for else ''}make more devices visible",
    )


class ProcessStart:
    """
    The environment that one instance's processes inherit.

    `enter` and `leave` bracket the moment of the start, possibly in different threads' stacks; `leave` may be called twice.
    """

    _lock = threading.Lock()

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Remember the variables to set."""
        self._environment = dict(environment)
        self._saved: dict[str, str | None] | None = None

    def enter(self) -> None:
        """Wait for the turn and set the variables."""
        self._lock.acquire()
        self._saved = {name: os.environ.get(name) for name in self._environment}
        os.environ.update(self._environment)

    def leave(self) -> None:
        """Restore the variables and let the next one start."""
        if self._saved is None:
            return
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved = None
        self._lock.release()
