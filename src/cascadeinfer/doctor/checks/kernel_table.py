"""
What is known of each attention backend about batches of mixed lengths.

The factors are simulated from each kernel's split rule, not measured (docs/doctor.md says how): the time of one layer's
attention for a batch of mixed lengths over that of equal lengths, of the same count and total, at 8 KV heads per GPU.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class KernelNote:
    """
    A backend.

    Attributes:
        title: Its name in prose.
        decoding: What mixed lengths cost where all requests decode.
        beside_prompts: What a long request costs in a step that also computes a prompt.
        gains: Whether stages of similar lengths spare that cost.
    """

    title: str
    decoding: str
    beside_prompts: str
    gains: str


NOTES: Final = {
    "FLASH_ATTN_2": KernelNote(
        "FlashAttention 2",
        "one split count for the whole batch: a long request holds the others up (1.2 to 12 times)",
        "a long request is not split at all",
        "stages gain most here",
    ),
    "FLASH_ATTN_3": KernelNote(
        "FlashAttention 3",
        "splits per request: 1.02 to 1.1 times; with one KV head per GPU under CUDA graphs 1.2 to 4 times",
        "beside more than about 400 prompt tokens a long request is not split",
        "stages gain little in decoding, more beside long prompts",
    ),
    "FLASHINFER": KernelNote(
        "FlashInfer",
        "one chunk size for the batch, and no splits in large batches (1.9 to 11 times)",
        "as in decoding: prompts are another call",
        "stages gain much at large batches",
    ),
    "FLASHINFER on 10": KernelNote(
        "FlashInfer with trtllm-gen kernels",
        "splits by the longest request: long ones form a tail",
        "as in decoding: prompts are another call",
        "stages gain much",
    ),
    "TRITON_ATTN": KernelNote(
        "vLLM's Triton kernel",
        "splits only batches of less than about 12 requests",
        "a long request is not split at all",
        "stages gain much; a FlashAttention build, where there is one, gains more",
    ),
}
"""By vLLM's name, with FlashAttention's version, and the device's major capability where it matters."""


def note_of(backend: str, capability: str = "") -> KernelNote | None:
    """
    What is known of a backend; None if nothing is.

    Args:
        backend: In vLLM's words, with FlashAttention's version.
        capability: Of the device, such as `9.0`.
    """
    major = capability.partition(".")[0]
    return NOTES.get(f"{backend} on {major}") or NOTES.get(backend)
