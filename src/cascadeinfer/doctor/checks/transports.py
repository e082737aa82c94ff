"""What carries KV blocks: between GPUs of this machine, between machines, and as UCX was seen to do it."""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.doctor.facts import Carriers, Devices, Machine, RdmaPort
from cascadeinfer.doctor.verdicts import Check, fault, not_applicable, ok, warning

NVLINK: Final = "NV"
ACTIVE: Final = "ACTIVE"
FAST_ON_GPU: Final = {"cuda_ipc", "gdr_copy"}
RDMA: Final = ("rc_", "dc_", "ud_", "gga_")
DETOUR: Final = "docker run --ipc host; in virtual machines, turn ACS off (NVIDIA: `nvidia-smi topo -p2p r`)"


def transport_checks(machine: Machine | None, devices: Devices | None) -> list[Check]:
    """Every pair of GPUs, RDMA, and the settings that restrict UCX."""
    checks = [] if devices is None else _pairs(devices)
    if machine is not None:
        on_gpu = devices is not None and bool(devices.devices)
        checks += [_rdma(machine, on_gpu=on_gpu), _settings(machine, on_gpu=on_gpu)]
    return checks


def _pairs(devices: Devices) -> list[Check]:
    if not devices.devices:
        return [not_applicable("between devices", "no GPUs; instances of this machine use shared memory and TCP")]
    if not devices.pairs:
        return [ok("between devices", "one GPU: instances that share it reach each other's memory (cuda_ipc)")]
    checks = []
    for pair in devices.pairs:
        name = f"devices {pair.one}-{pair.other}"
        link = pair.link or "unknown link"
        if not pair.peers:
            found = f"neither reaches the other's memory ({link}): KV blocks go through main memory"
            checks.append(warning(name, found, DETOUR))
        elif pair.link.startswith(NVLINK):
            checks.append(ok(name, f"cuda_ipc over NVLink ({link})"))
        else:
            checks.append(ok(name, f"cuda_ipc over PCIe ({link}), slower than NVLink"))
    return checks


def _rdma(machine: Machine, *, on_gpu: bool) -> Check:
    name = "RDMA"
    if not machine.rdma:
        return not_applicable(name, "no adapter: KV blocks travel to other machines over TCP")
    active = [port for port in machine.rdma if port.state.upper() == ACTIVE]
    if not active:
        found = f"no port is active: {_shown(machine.rdma)}; KV blocks travel to other machines over TCP"
        return warning(name, found, "ibstat and `rdma link` say why; check cable, switch and subnet manager")
    if on_gpu and not machine.peer_memory:
        found = f"{_shown(active)}, but nvidia_peermem is not loaded: UCX may go through main memory"
        return warning(name, found, "modprobe nvidia_peermem on the host (or a driver and kernel with dma-buf)")
    return ok(name, _shown(active))


def _shown(ports: Sequence[RdmaPort]) -> str:
    return ", ".join(f"{port.device}:{port.port} {port.link_layer} {port.state}" for port in ports)


def _settings(machine: Machine, *, on_gpu: bool) -> Check:
    name, said = "settings of UCX", machine.settings
    allowed = said.get("UCX_TLS", "").lower()
    words = {word.strip() for word in allowed.split(",") if word.strip()}
    if on_gpu and words and not words & {"all", "cuda", "cuda_ipc"} and not allowed.startswith("^"):
        return fault(name, f"UCX_TLS={allowed} has no cuda: KV blocks cannot leave a GPU", "unset UCX_TLS, or add cuda")
    if on_gpu and allowed.startswith("^") and "cuda" in allowed:
        return fault(name, f"UCX_TLS={allowed} rules cuda out: KV blocks cannot leave a GPU", "unset UCX_TLS")
    told = ", ".join(f"{key}={value}" for key, value in sorted(said.items()) if key.startswith("UCX_"))
    return ok(name, told or "none in the environment")


def carrier_checks(carriers: Carriers, *, on_gpu: bool) -> list[Check]:
    """What UCX said that it uses between the two instances of the trial."""
    name, used = "instances 0-1", carriers.transports
    told = ", ".join(used)
    if not used:
        return [not_applicable(name, "UCX did not say what carries KV blocks (UCX_LOG_FILE is set)")]
    if on_gpu and not FAST_ON_GPU & set(used) and not any(one.startswith(RDMA) for one in used):
        found = f"KV blocks travel by {told}, not from GPU to GPU (cuda_ipc)"
        return [warning(name, found, DETOUR)]
    return [ok(name, f"KV blocks travel by {told}")]
