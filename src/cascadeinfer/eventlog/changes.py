"""
Load reports as changes: an instance's report, written as what differs from the one before it in the same file.

Most events of a log are load reports, and most reports say the same again, or the same requests with more tokens. A
report whose instance has none before it in the file is written in full; the file therefore needs no other to be read.
After that, each field that is unchanged is left out. Ids of requests that were in the previous report are written as
their position there (running requests first, then waiting ones), as a number instead of a text. Nothing is rounded or
summed up: what is read is what the policy was given.

Everything is derived from the fields of `InstanceReport`, so a new field is logged without a change here.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from cascadeinfer.core.events import InstanceReport, InstanceReported
from cascadeinfer.core.types import InstanceId
from cascadeinfer.eventlog.codec import Wire, wire_of

_HINTS: Final = typing.get_type_hints(InstanceReport)
_IDS: Final = frozenset(name for name, hint in _HINTS.items() if hint == tuple[str, ...])
"""Fields that hold ids of requests."""
_REFERENCE: Final = tuple[int | str, ...]
"""An id, or its position in the previous report."""
_WIRES: Final = {
    field.name: Wire(_REFERENCE, None, None) if field.name in _IDS else wire_of(_HINTS[field.name])
    for field in dataclasses.fields(InstanceReport)
}
_CHANGE: Final = msgspec.defstruct(
    "ReportChange",
    [(name, wire.hint | msgspec.UnsetType, msgspec.UNSET) for name, wire in _WIRES.items()],
    omit_defaults=True,
    forbid_unknown_fields=True,
    frozen=True,
)
if TYPE_CHECKING:  # defined at run time
    ReportChange: TypeAlias = Any
else:
    ReportChange = _CHANGE
    """The changed fields of a report."""


class UnknownReportError(ValueError):
    """A change refers to something that the reports before it do not have."""


class LastReports:
    """
    The last report of each instance in one file. The writer and the reader of a file keep the same ones.

    Forget them where a new file begins.
    """

    def __init__(self) -> None:
        """Start without reports."""
        self._last: dict[InstanceId, InstanceReported] = {}

    def forget(self) -> None:
        """A new file begins."""
        self._last.clear()

    def note(self, event: InstanceReported) -> None:
        """An instance's report is now in the file."""
        self._last[event.instance_id] = event

    def change(self, event: InstanceReported) -> tuple[str | None, ReportChange | None] | None:
        """
        What is new in a report.

        Returns:
            Its cause and its changed fields, each None if it is unchanged; None if the report must be written in full.
        """
        last = self._last.get(event.instance_id)
        if last is None:
            return None
        cause = None if event.cause == last.cause else event.cause
        if event.report == last.report:
            return cause, None
        return cause, ReportChange(**_changed(last.report, event.report))

    def event(self, instance_id: InstanceId, cause: str | None, change: ReportChange | None) -> InstanceReported:
        """
        The report with this change.

        Raises:
            UnknownReportError: The file has no report of the instance so far, or the previous one has no such request.
        """
        last = self._last.get(instance_id)
        if last is None:
            raise UnknownReportError(f"a change of instance {instance_id}'s report, of which this file has none so far")
        report = last.report if change is None else dataclasses.replace(last.report, **_given(last.report, change))
        return InstanceReported(last.cause if cause is None else cause, instance_id, report)


def _changed(before: InstanceReport, after: InstanceReport) -> dict[str, Any]:
    """The fields that differ, as they are written."""
    changed: dict[str, Any] = {}
    positions: Mapping[str, int] | None = None
    for name, wire in _WIRES.items():
        value = getattr(after, name)
        if value == getattr(before, name):
            continue
        if name in _IDS:
            if positions is None:
                positions = {request_id: at for at, request_id in enumerate(_known(before))}
            changed[name] = tuple([positions.get(request_id, request_id) for request_id in value])
        else:
            changed[name] = value if wire.out is None else wire.out(value)
    return changed


def _given(before: InstanceReport, change: ReportChange) -> dict[str, Any]:
    """The changed fields, as they were."""
    given: dict[str, Any] = {}
    known: Sequence[str] | None = None
    for name, wire in _WIRES.items():
        value = getattr(change, name)
        if value is msgspec.UNSET:
            continue
        if name in _IDS:
            if known is None:
                known = _known(before)
            given[name] = tuple([_named(known, reference) for reference in value])
        else:
            back: Callable[[Any], Any] | None = wire.back
            given[name] = value if back is None else back(value)
    return given


def _known(report: InstanceReport) -> tuple[str, ...]:
    return report.running_ids + report.waiting_ids


def _named(known: Sequence[str], reference: int | str) -> str:
    if isinstance(reference, str):
        return reference
    if not 0 <= reference < len(known):
        raise UnknownReportError(f"request {reference} of a report that has {len(known)}")
    return known[reference]
