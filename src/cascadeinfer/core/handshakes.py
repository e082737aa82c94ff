"""
Which side is ill when an instance cannot shake hands with others.

A handshake needs the side channel of one instance and the worker of the other, both ways. The front end can find out
whether each side channel answers, and with which other instances the newcomer has shaken hands.
"""

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from cascadeinfer.core.types import InstanceId

ENOUGH_WITNESSES: Final = 2
"""Peers with answering side channels that must all fail with a newcomer, with none that succeeds, to blame it."""


class Diagnosis(NamedTuple):
    """
    Who is ill.

    Attributes:
        newcomer: Why the newcomer is, or None.
        peers: Those that are.
    """

    newcomer: str | None
    peers: tuple[InstanceId, ...] = ()


def diagnose(connected: Collection[InstanceId], newcomer_answers: bool, failed: Mapping[InstanceId, bool]) -> Diagnosis:
    """
    Args:
        connected: Peers that the newcomer has shaken hands with.
        newcomer_answers: Whether its side channel does.
        failed: Per peer with which it could not, whether that one's side channel answers.
    """
    ill = tuple(instance_id for instance_id, answers in failed.items() if not answers)
    well = [instance_id for instance_id, answers in failed.items() if answers]
    if failed and not newcomer_answers:
        return Diagnosis("its side channel does not answer", ill)
    if not connected and len(well) >= ENOUGH_WITNESSES:
        return Diagnosis(f"no handshake with any of {', '.join(well)}, whose side channels answer", ill)
    return Diagnosis(None, ill)
