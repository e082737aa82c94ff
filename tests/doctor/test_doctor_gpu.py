"""What is asked of GPUs, with a torch that stands for one with two of them; and the kernels' timing on a processor."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascadeinfer.doctor.facts import DevicePair, Mixed
from cascadeinfer.doctor.gathering import devices
from cascadeinfer.doctor.gathering.notes import Notes, read_notes

GIB = 2**30
TOPOLOGY = "\tGPU0\tGPU1\nGPU0\t X \tSYS\nGPU1\tSYS\t X\n"


def torch_with(**changes: Any) -> Any:
    """A torch built for CUDA that sees two H100."""
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "get_device_properties": lambda _: SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * GIB),
        "mem_get_info": lambda index: ((70 - index) * GIB, 80 * GIB),
        "can_device_access_peer": lambda _one, _other: False,
        **changes,
    }
    return SimpleNamespace(__version__="2.14.0", version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(**cuda))


@pytest.fixture
def topology(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi says."""
    monkeypatch.setattr(devices, "_tool", lambda *_: (TOPOLOGY, ""))


def test_gpus_and_their_pairs(topology: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - its effect
    """Each with its memory; the pair with its link."""
    monkeypatch.setitem(sys.modules, "torch", torch_with())
    found = devices.asked_torch("580.65", "")
    assert (found.error, found.cuda, found.driver) == ("", "13.0", "580.65")
    assert [(device.name, device.capability, device.free_memory_bytes) for device in found.devices] == [
        ("NVIDIA H100", "9.0", 70 * GIB),
        ("NVIDIA H100", "9.0", 69 * GIB),
    ]
    assert found.pairs == [DevicePair(one=0, other=1, peers=False, link="SYS")]


def test_a_gpu_that_torch_cannot_use(topology: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Torch's reason, in one line."""

    def fails() -> None:
        raise RuntimeError("The NVIDIA driver on your system\nis too old")

    monkeypatch.setitem(sys.modules, "torch", torch_with(is_available=lambda: False, init=fails))
    assert devices.asked_torch("470.1", "").error == "The NVIDIA driver on your system is too old"
    monkeypatch.setitem(sys.modules, "torch", torch_with(is_available=lambda: False))
    assert devices.asked_torch("470.1", "").error == "torch finds no GPU"


def test_device_files_without_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without NVIDIA's tools has GPUs all the same; without device files there are none."""
    monkeypatch.setattr(devices, "TOOL", "no-such-tool")
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    assert devices.asked_driver() == ("", "")
    (tmp_path / "nvidia0").touch()
    assert devices.asked_driver() == ("", "there are GPUs, but no no-such-tool")


@pytest.mark.parametrize(
    ("script", "driver", "error"),
    [
        ("echo 580.65.06; echo 580.65.06", "580.65.06", ""),
        ("echo 'Failed to initialize NVML'; exit 9", "", "tool ends with 9: Failed to initialize NVML"),
    ],
)
def test_the_drivers_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, driver: str, error: str
) -> None:
    """The first GPU's; or why there is none."""
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(devices, "TOOL", "tool")
    assert devices.asked_driver() == (driver, error)


def test_kernels_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor: torch's own attention, shorter lengths; a ratio per batch, alone and beside a prompt."""
    torch = pytest.importorskip("torch")
    from cascadeinfer.doctor.gathering import kernels

    torch.set_num_threads(1)
    monkeypatch.setattr(kernels, "CALLS", 2)
    kernels.gather(Notes(tmp_path / "notes"), ["cpu", "512"])
    found = [fact for fact in read_notes(tmp_path / "notes") if isinstance(fact, Mixed)]
    assert [(fact.what, fact.prompt_tokens) for fact in found] == [("torch", 0)] * 3 + [("torch", 2)] * 3
    assert all(fact.ratio > 0.0 and not fact.error and fact.samples == 2 for fact in found)


def test_a_kernel_that_cannot_be_called_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason; the others are timed."""
    pytest.importorskip("torch")
    from cascadeinfer.doctor.gathering import kernels
    from cascadeinfer.profiling.kernels.calls import Kernel

    def prepare(_: object) -> list[Any]:
        raise TypeError("another version")

    monkeypatch.setattr(kernels, "kernels_here", lambda _: [Kernel("FA9", prepare)])
    kernels.gather(Notes(tmp_path / "notes"), ["cpu", "512"])
    (fact,) = [fact for fact in read_notes(tmp_path / "notes") if isinstance(fact, Mixed)]
    assert (fact.what, fact.error) == ("FA9", "it cannot be called: TypeError: another version")
