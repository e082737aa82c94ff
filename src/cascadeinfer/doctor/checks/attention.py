"""The attention backend, and what mixed lengths were measured to cost."""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.doctor.checks.kernel_table import note_of
from cascadeinfer.doctor.facts import Backend, Devices, Mixed
from cascadeinfer.doctor.verdicts import Check, not_applicable, ok, warning

KERNEL_OF: Final = {
    "FLASH_ATTN_2": ("FA2",),
    "FLASH_ATTN_3": ("FA3", "FA3 graphs"),
    "FLASH_ATTN_4": ("FA4",),
    "FLASHINFER": ("FlashInfer", "FlashInfer tensor-core"),
    "TRITON_ATTN": ("Triton unified",),
}
"""Which of the timed kernels are this backend's (`profiling/kernels/calls.py`)."""
COSTLY: Final = 1.25
PROFILE: Final = "cascadeinfer profile MODEL --output FILE measures it for your model, and plan uses it"


def backend_checks(backend: Backend, devices: Devices | None) -> list[Check]:
    """The backend that vLLM would choose, and what is known of it."""
    name = "attention backend"
    if backend.error:
        return [warning(name, f"vLLM could not be asked: {backend.error}", "is this a supported version of vLLM?")]
    capability = devices.devices[0].capability if devices is not None and devices.devices else ""
    note = note_of(backend.name, capability)
    if note is None:
        return [ok(name, f"{backend.name}; nothing is known of its splits: {PROFILE}")]
    found = f"{note.title}. Decoding: {note.decoding}. Beside prompts: {note.beside_prompts}. So {note.gains}"
    return [ok(name, found)]


def mixed_checks(found: Sequence[Mixed], backend: Backend | None) -> list[Check]:
    """What was measured, the backend's own kernels first; other kernels that are installed do not serve."""
    name = "mixed lengths"
    if not found:
        return [not_applicable(name, "not measured")]
    wanted = KERNEL_OF.get(backend.name, ()) if backend is not None else ()
    own = [one for one in found if one.what in wanted] or [one for one in found if not one.error] or list(found)
    return [_mixed(name, one) for one in own]


def _mixed(name: str, one: Mixed) -> Check:
    if one.error:
        return warning(name, f"{one.what} could not be timed: {one.error}", PROFILE)
    beside = f" beside {one.prompt_tokens} prompt tokens" if one.prompt_tokens else ""
    told = f"{one.what}, {one.batch}{beside}: {one.ratio:.2f} times as long as equal lengths (medians of {one.samples})"
    return ok(name, f"{told}; stages spare that" if one.ratio >= COSTLY else told)
