"""
Record the facts of one vLLM version about every internal that we use, and compare versions.

    python tools/seams/facts.py                         # the table: what we use, how, and what we assume
    python tools/seams/facts.py --vllm 0.33.0           # download that wheel and list differences from the record
    python tools/seams/facts.py --vllm 0.33.0 --record  # record its facts, once every difference has been dealt with

Facts are the parameters of functions and classes, and hashes of the bodies that we override or patch. They are stored
in `VERSION.json` beside this file; what we assume of each name is in `assumptions.toml`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from our_uses import Use, uses_of
from vllm_sources import VllmSources, body_hash, parameters

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src" / "cascadeinfer"
BASE = "0.32.0"
"""The version with which others are compared."""

Facts = dict[str, dict[str, str | None]]
"""By `module.name` or `module.name:member`: `parameters` and `body`, where they exist."""


def facts_of(vllm: VllmSources, uses: dict[str, Use]) -> Facts:
    """The facts of this version; a name that it lacks has none."""
    facts: Facts = {}
    for key, use in sorted(uses.items()):
        for member, how in [(None, "used"), *sorted(use.members.items())]:
            found = vllm.used(key, member)
            if found is not None:
                fact = {"parameters": parameters(found.node)}
                if how != "used":
                    fact["body"] = body_hash(found.node)
                facts[key if member is None else f"{key}:{member}"] = {k: v for k, v in fact.items() if v is not None}
    return facts


def differences(before: Facts, after: Facts) -> list[str]:
    """The differences in words, one per name; empty if nothing that we use has changed."""
    lines = [f"{name}: gone" for name in before if name not in after]
    lines += [f"{name}: new here" for name in after if name not in before]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old.get("parameters") != new.get("parameters"):
            lines.append(f"{name}: parameters ({old.get('parameters')}) became ({new.get('parameters')})")
        if old.get("body") != new.get("body"):
            lines.append(f"{name}: the body that we override or patch has changed")
    return sorted(lines)


def recorded(version: str) -> Facts:
    """The recorded facts of a version that has been reviewed."""
    facts: Facts = json.loads((HERE / f"{version}.json").read_text())
    return facts


def assumptions() -> dict[str, str]:
    """What we take for granted, by `module.name`."""
    return tomllib.loads((HERE / "assumptions.toml").read_text())


def download(version: str, folder: Path) -> Path:
    """Download the wheel of a version, without its dependencies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        f"vllm=={version}",
    ]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("vllm-*.whl")
    return wheel


def table(uses: dict[str, Use], facts: Facts) -> str:
    """Everything that we rely on, as text."""
    lines = []
    said = assumptions()
    for key, use in sorted(uses.items()):
        lines += [key, f"    assumed: {said.get(key, '-')}", f"    users:   {', '.join(sorted(use.users))}"]
        for member, how in [(None, "imported"), *sorted(use.members.items())]:
            fact = facts.get(key if member is None else f"{key}:{member}", {})
            signature = f"({fact['parameters']})" if "parameters" in fact else ""
            if member is not None or signature:
                lines.append(f"    {how:<10} {member or ''}{signature}")
    return "\n".join(lines)


def main() -> None:
    """See the module header."""
    parser = argparse.ArgumentParser(description="What CascadeInfer relies on inside vLLM")
    parser.add_argument("--vllm", metavar="VERSION", help="compare this version with the recorded one")
    parser.add_argument("--record", action="store_true", help="record the facts of this version")
    options = parser.parse_args()
    uses = uses_of(SOURCE, VllmSources.installed())
    if options.vllm is None:
        print(table(uses, facts_of(VllmSources.installed(), uses)))
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = facts_of(VllmSources(download(options.vllm, Path(folder))), uses)
    found = differences(recorded(BASE), facts)
    print(f"vLLM {options.vllm} against {BASE}: {len(facts)} names, {len(found)} differences")
    print("\n".join(found))
    if options.record:
        (HERE / f"{options.vllm}.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
