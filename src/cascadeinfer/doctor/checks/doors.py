"""Engines that others have started: who answers at their doors."""

from collections.abc import Sequence

from cascadeinfer.doctor.facts import Door
from cascadeinfer.doctor.verdicts import Check, fault, ok, warning


def door_checks(doors: Sequence[Door], version: str) -> list[Check]:
    """
    A line per engine.

    Args:
        doors: What they answered.
        version: Of this program; front end and engines should have the same.
    """
    return [_door(door, version) for door in doors]


def _door(door: Door, version: str) -> Check:
    name = f"engine {door.address}"
    if door.refused:
        fix = "give both ends the same file: --cluster-key here, cascade_key_file at the engine"
        return fault(name, "who listens there is no engine with this key", fix)
    if door.error:
        fix = "is the engine up, cascade_listen its address, and the port open on the way (nc -vz HOST PORT)?"
        return fault(name, door.error, fix)
    found = f"answers in {1e3 * door.seconds:.0f} ms, on {door.node}, version {door.version}"
    if door.version != version:
        return warning(name, f"{found}; this is {version}", "install the same version at both ends")
    return ok(name, f"{found}; run `cascadeinfer doctor` there, too")
