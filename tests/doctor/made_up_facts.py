"""Facts of a machine on which all is well, to be changed one by one."""

from cascadeinfer.doctor.facts import (
    Backend,
    Carriers,
    Device,
    DevicePair,
    Devices,
    Door,
    HostName,
    Machine,
    Mixed,
    Move,
    Nixl,
    RdmaPort,
    Software,
    Started,
)

GIB = 2**30
INSTALL = "pip install 'cascadeinfer[gpu]'"
HOST = HostName(name="node7", addresses=["10.0.0.7"], seconds=0.002)
MACHINE = Machine(
    system="Linux-6.1",
    processor="AMD EPYC",
    cores=32,
    cpu_quota=None,
    memory_bytes=256 * GIB,
    free_memory_bytes=200 * GIB,
    shared_memory_bytes=128 * GIB,
    free_shared_memory_bytes=120 * GIB,
    open_files=1024,
    open_files_max=1_048_576,
    locked_memory_bytes=None,
    folder_fault="",
    folder_fix="",
    loopback_fault="",
    port=8000,
    port_fault="",
    rdma=[RdmaPort(device="mlx5_0", port="1", state="ACTIVE", link_layer="InfiniBand")],
    peer_memory=True,
    settings={},
)
SOFTWARE = Software(
    python="3.11.7", versions={"cascadeinfer": "0.1.0", "vllm": "0.33.1", "nixl": "1.5.1", "torch": "2.14.0"}
)
NIXL = Nixl(plugins=["POSIX", "UCX"])
H100 = Device(
    index=0, name="NVIDIA H100 80GB HBM3", capability="9.0", memory_bytes=80 * GIB, free_memory_bytes=79 * GIB
)
DEVICES = Devices(
    driver="580.65.06",
    driver_error="",
    torch="2.14.0",
    cuda="13.0",
    devices=[H100],
    pairs=[DevicePair(one=0, other=1, peers=True, link="NV18")],
)
NO_DEVICES = Devices(driver="", driver_error="", torch="2.13.0+cpu", cuda="", devices=[], pairs=[])
BACKEND = Backend(name="FLASH_ATTN_3")
STARTED = Started(seconds=41.0, device="NVIDIA H100", backend="TRITON_ATTN", kv_tokens=8160)
CARRIERS = Carriers(transports=["cuda_ipc"])
MOVE = Move(
    source="0",
    target="1",
    context_tokens=200,
    pulled=True,
    refusal="",
    tokens=96,
    differs_at=None,
    gap_s=0.010,
    pause_s=0.015,
)
MIXED = Mixed(what="FA3", batch="31 x 1K + 1 x 128K", ratio=1.04, samples=32)
DOOR = Door(address="10.0.0.7:7300", node="node7", version="0.1.0", seconds=0.004)
