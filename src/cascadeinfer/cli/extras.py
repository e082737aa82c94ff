"""
What the core does not install: which extra has a package, and the command that installs it on this machine.

`main` answers a package that turns out to be missing with that command. A command that would find out late, or by way
of another package, asks first with `need`.
"""

import importlib.util
import shutil
from typing import Final

_ENGINE: Final = (
    "fastapi",
    "flashinfer",
    "gguf",
    "nixl",
    "openai",
    "opentelemetry",
    "pydantic",
    "safetensors",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
    "uvloop",
    "vllm",
    "yaml",
    "zmq",
)
"""Packages that come with an engine: some with vLLM itself, which `cpu` and `gpu` have in different builds."""
EXTRAS: Final = {
    "aiohttp": "bench",
    "matplotlib": "figures",
    "pyarrow": "figures",
    "ray": "ray",
    **dict.fromkeys(_ENGINE, "engine"),
}
"""Optional packages, with the extra that has them; `engine` stands for `cpu` or `gpu`."""
TORCH_INDEX: Final = "https://download.pytorch.org/whl/cpu"
"""Where the CPU build of torch is, which PyPI does not have."""


def installation(extra: str) -> str:
    """The command that installs an extra; for `engine` that of this machine, by whether it has NVIDIA's tools."""
    if extra != "engine":
        return f"pip install 'cascadeinfer[{extra}]'"
    if shutil.which("nvidia-smi"):
        return "pip install 'cascadeinfer[gpu]'"
    return f"pip install --extra-index-url {TORCH_INDEX} 'cascadeinfer[cpu]'"


def need(package: str) -> None:
    """
    Check that an optional package is installed, without importing it.

    Raises:
        ModuleNotFoundError: It is not; the entry point names the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
