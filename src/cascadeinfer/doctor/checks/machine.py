"""The machine: its name, cores, memory, limits, folders and ports."""

from typing import Final

from cascadeinfer.doctor.facts import HostName, Machine
from cascadeinfer.doctor.verdicts import Check, fault, not_applicable, ok, warning

GIB: Final = 2**30
SLOW_LOOKUP_S: Final = 1.0
FEW_CORES: Final = 4
"""Two instances and a front end keep fewer busy."""
FREE_MEMORY_MIN_BYTES: Final = 2 * GIB
"""Two idle processes of vLLM take as much."""
FREE_MEMORY_LOW_BYTES: Final = 6 * GIB
SHARED_MEMORY_MIN_BYTES: Final = 128 * 2**20
"""Containers get 64 MiB by default; vLLM's queues between the processes of one instance take more than that."""
SHARED_MEMORY_LOW_BYTES: Final = GIB
LOCKED_MEMORY_MIN_BYTES: Final = GIB
"""Fewer KV blocks than any real instance has."""
OPEN_FILES_MIN: Final = 1024
OPEN_FILES_WANTED: Final = 65_535
"""What the server asks for (`frontend/listening.py`)."""
OPEN_FILES_LOW: Final = 4096


def host_name_checks(host: HostName) -> list[Check]:
    """The machine's name resolves, and quickly: every look-up and every group of processes waits for it."""
    name = "host name"
    fix = f"echo '127.0.1.1 {host.name}' | sudo tee -a /etc/hosts"
    if not host.addresses:
        found = f"{host.name} does not resolve ({host.error}; asked for {host.seconds:.1f} s): starts and peers wait"
        return [fault(name, found, fix)]
    if host.seconds > SLOW_LOOKUP_S:
        found = f"looking {host.name} up takes {host.seconds:.1f} s, each time"
        return [warning(name, found, f"{fix}, or repair its name server")]
    return [ok(name, f"{host.name} is {host.addresses[0]}, found in {1e3 * host.seconds:.0f} ms")]


def machine_checks(machine: Machine) -> list[Check]:
    """Everything else about the machine, except what carries KV blocks (`transports.py`)."""
    return [
        _processor(machine),
        _memory(machine),
        _shared_memory(machine),
        _open_files(machine),
        _locked_memory(machine),
        _folder(machine),
        _loopback(machine),
        _port(machine),
    ]


def _processor(machine: Machine) -> Check:
    found = f"{machine.cores} cores of {machine.processor}"
    quota = machine.cpu_quota
    if quota is not None and quota < min(machine.cores, FEW_CORES):
        found += f", but time of {quota:g} only (a container's quota): the processes of one instance wait for another"
        return warning("processor", found, "give the container whole cores (--cpuset-cpus) instead of a quota (--cpus)")
    return ok("processor", found)


def _memory(machine: Machine) -> Check:
    free = machine.free_memory_bytes
    found = f"{free / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB free"
    fix = "end other programs or raise the container's limit; on a CPU see --kv-cache-memory-bytes"
    if free < FREE_MEMORY_MIN_BYTES:
        return fault("memory", f"{found}: two instances do not fit", fix)
    if free < FREE_MEMORY_LOW_BYTES:
        return warning("memory", f"{found}: two instances just fit, without a model's weights", fix)
    return ok("memory", found)


def _shared_memory(machine: Machine) -> Check:
    name, free, size = "shared memory", machine.free_shared_memory_bytes, machine.shared_memory_bytes
    fix = "docker run --shm-size 8g; Kubernetes: an emptyDir with medium Memory at /dev/shm"
    if free is None or size is None:
        return fault(name, "there is no /dev/shm", fix)
    found = f"{free / GIB:.2g} of {size / GIB:.2g} GiB of /dev/shm free"
    if free < SHARED_MEMORY_MIN_BYTES:
        return fault(name, f"{found}: instances die of it (bus error)", fix)
    if free < SHARED_MEMORY_LOW_BYTES:
        return warning(name, f"{found}: not enough for several workers per instance", fix)
    return ok(name, found)


def _open_files(machine: Machine) -> Check:
    name, hard = "open files", machine.open_files_max
    if hard is None:
        return ok(name, "no limit")
    found = f"at most {hard}"
    fix = f"raise the hard limit to {OPEN_FILES_WANTED}: ulimit -Hn, LimitNOFILE= (systemd), --ulimit nofile= (docker)"
    if hard < OPEN_FILES_MIN:
        return fault(name, f"{found}: engines' sockets alone may need more", fix)
    if hard < OPEN_FILES_LOW:
        return warning(name, f"{found}: each connection takes one, so clients beyond them are turned away", fix)
    return ok(name, found)


def _locked_memory(machine: Machine) -> Check:
    name, limit = "locked memory", machine.locked_memory_bytes
    if not machine.rdma:
        return not_applicable(name, "matters for RDMA, and there is no adapter")
    if limit is None:
        return ok(name, "no limit")
    found = f"at most {limit / 2**20:.0f} MiB: RDMA registers all KV blocks"
    fix = "ulimit -l unlimited; LimitMEMLOCK=infinity (systemd), --ulimit memlock=-1 (docker)"
    return fault(name, found, fix) if limit < LOCKED_MEMORY_MIN_BYTES else warning(name, found, fix)


def _folder(machine: Machine) -> Check:
    if machine.folder_fault:
        return fault("private folder", machine.folder_fault, machine.folder_fix or "set TMPDIR to another folder")
    return ok("private folder", "can be made, and its sockets' names are short enough")


def _loopback(machine: Machine) -> Check:
    if machine.loopback_fault:
        found = f"cannot be used ({machine.loopback_fault}): instances of one machine talk over it"
        return fault("loopback", found, "ip link set lo up")
    return ok("loopback", "works")


def _port(machine: Machine) -> Check:
    name = f"port {machine.port}"
    if machine.port_fault:
        fix = f"cascadeinfer serve --port another, or end what listens (ss -ltnp | grep :{machine.port})"
        return warning(name, f"cannot be listened on: {machine.port_fault}", fix)
    return ok(name, "free")
