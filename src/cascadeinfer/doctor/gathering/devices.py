"""
GPUs, their driver, which of them reach each other's memory, and the attention backend that vLLM would choose.

A process of its own: asking torch about a device takes some hundred MB of that device's memory until the process ends.
"""

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from cascadeinfer.doctor.facts import Backend, Device, DevicePair, Devices
from cascadeinfer.doctor.gathering.notes import Notes

TOOL: Final = "nvidia-smi"
TOOL_TIMEOUT_S: Final = 30.0
DEVICE_FILES: Final = Path("/dev")
HEAD_SIZE: Final = 128
"""Of the layer that vLLM is asked about: that of most models."""


def gather(notes: Notes, _: Sequence[str]) -> None:
    """Ask the driver's tool, torch, and vLLM, as far as they are there."""
    notes.doing(f"asking {TOOL}")
    driver, driver_error = asked_driver()
    if importlib.util.find_spec("torch") is None:
        notes.add(Devices(driver=driver, driver_error=driver_error, torch="", cuda="", devices=[], pairs=[]))
        return
    notes.doing("asking torch about GPUs")
    notes.add(asked_torch(driver, driver_error))
    if importlib.util.find_spec("vllm") is not None:
        notes.doing("asking vLLM for its attention backend")
        notes.add(asked_vllm())


def asked_driver() -> tuple[str, str]:
    """The driver's version, and why there is none; both are empty where nothing looks like a GPU."""
    if shutil.which(TOOL) is None:
        present = any(DEVICE_FILES.glob("nvidia[0-9]*"))
        return "", f"there are GPUs, but no {TOOL}" if present else ""
    version, error = _tool("--query-gpu=driver_version", "--format=csv,noheader")
    return (version.splitlines() or [""])[0].strip(), error


def _tool(*words: str) -> tuple[str, str]:
    """Output of the driver's tool, or why there is none."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed words
            [TOOL, *words], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"{TOOL} does not answer within {TOOL_TIMEOUT_S:g} s"
    except OSError as error:
        return "", f"{TOOL}: {error.strerror}"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return "", f"{TOOL} ends with {done.returncode}" + (f": {said[-1]}" if said else "")
    return done.stdout, ""


def asked_torch(driver: str, driver_error: str) -> Devices:
    """The GPUs that torch sees."""
    import torch  # noqa: PLC0415 - takes seconds, and may fail

    def told(error: str, devices: Sequence[Device] = (), pairs: Sequence[DevicePair] = ()) -> Devices:
        return Devices(
            driver=driver, driver_error=driver_error, torch=str(torch.__version__), cuda=str(torch.version.cuda or ""),
            devices=list(devices), pairs=list(pairs), error=error,
        )  # fmt: skip

    if torch.version.cuda is None:
        return told("")
    try:
        if not torch.cuda.is_available():
            torch.cuda.init()  # says why
            return told("torch finds no GPU")
        devices = [_device(torch, index) for index in range(torch.cuda.device_count())]
        links = links_in(_tool("topo", "-m")[0])
        pairs = [
            DevicePair(
                one=a, other=b, link=links.get((a, b), ""),
                peers=torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a),
            )
            for a, b in combinations(range(len(devices)), 2)
        ]  # fmt: skip
    except (RuntimeError, AssertionError) as error:
        return told(" ".join(str(error).split()))
    return told("", devices, pairs)


def _device(torch: Any, index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    free_bytes, _ = torch.cuda.mem_get_info(index)
    return Device(
        index=index, name=facts.name, capability=f"{facts.major}.{facts.minor}", memory_bytes=facts.total_memory,
        free_memory_bytes=free_bytes,
    )  # fmt: skip


def links_in(matrix: str) -> dict[tuple[int, int], str]:
    """What is between two GPUs, from `nvidia-smi topo -m`: NV18, PIX, PXB, PHB, NODE or SYS."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines()]
    header = next((row for row in rows if row and row[0] == "GPU0" and "X" not in row), [])
    columns = [int(word[3:]) for word in header if re.fullmatch(r"GPU\d+", word)]
    found = {}
    for row in rows:
        if row and row is not header and re.fullmatch(r"GPU\d+", row[0]):
            for column, word in zip(columns, row[1:], strict=False):
                if word != "X":
                    found[int(row[0][3:]), column] = word
    return found


def asked_vllm() -> Backend:
    """The backend for bfloat16 and heads of 128, with the connector; other models may get another one."""
    try:
        import torch  # noqa: PLC0415 - takes seconds, and may fail
        from vllm.platforms import current_platform  # noqa: PLC0415 - imports vLLM
        from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: PLC0415 - imports vLLM

        asked = AttentionSelectorConfig(HEAD_SIZE, torch.bfloat16, "auto", None, use_kv_connector=True)
        path = current_platform.get_attn_backend_cls(None, asked)
        module, _, name = path.rpartition(".")
        backend = getattr(importlib.import_module(module), name).get_name()
        if backend == "FLASH_ATTN":
            from vllm.v1.attention.backends.fa_utils import (  # noqa: PLC0415 - imports vLLM
                get_flash_attn_version,
            )

            backend = f"{backend}_{get_flash_attn_version(head_size=HEAD_SIZE)}"
        return Backend(name=backend)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        return Backend(name="", error=f"{type(error).__name__}: {' '.join(str(error).split())}")
