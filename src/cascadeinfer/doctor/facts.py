"""
What the doctor gathers, as typed data: written by the parts' processes as JSON lines, read by the checks.

A part may write several facts; those that it wrote before it failed count. Sizes are bytes, times seconds.
"""

import enum
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec


class _Fact(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """One line."""


class Doing(_Fact, frozen=True):
    """What the part is about to do; if it is the last line, that failed or hung."""

    what: str


class HostName(_Fact, frozen=True):
    """
    A look-up of this machine's own name.

    Attributes:
        addresses: Empty if it does not resolve.
        error: Why not.
    """

    name: str
    addresses: list[str]
    seconds: float
    error: str = ""


class RdmaPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port of a network adapter that can do RDMA, as the kernel describes it."""

    device: str
    port: str
    state: str
    link_layer: str


class Machine(_Fact, frozen=True):
    """
    The machine, as far as this process may use it.

    Attributes:
        cores: On which it may run.
        cpu_quota: Cores' worth of time that its container may use; None without a limit.
        free_memory_bytes: Free now, within the container's limit.
        shared_memory_bytes, free_shared_memory_bytes: Of the shared memory's file system; None if there is none.
        open_files, open_files_max: Soft and hard limit; None without one.
        locked_memory_bytes: Soft limit; None without one.
        folder_fault, folder_fix: Why a server's private folder cannot be made, and what helps; empty if it can.
        loopback_fault: Why two processes cannot talk over the loopback; empty if they can.
        port: On which a server would listen.
        port_fault: Why it could not.
        rdma: Ports of RDMA adapters.
        peer_memory: Whether adapters can reach a GPU's memory (nvidia_peermem).
        settings: Environment variables that change transports or devices, from a fixed list of names.
    """

    system: str
    processor: str
    cores: int
    cpu_quota: float | None
    memory_bytes: int
    free_memory_bytes: int
    shared_memory_bytes: int | None
    free_shared_memory_bytes: int | None
    open_files: int | None
    open_files_max: int | None
    locked_memory_bytes: int | None
    folder_fault: str
    folder_fix: str
    loopback_fault: str
    port: int
    port_fault: str
    rdma: list[RdmaPort]
    peer_memory: bool
    settings: dict[str, str]


class Software(_Fact, frozen=True):
    """
    What is installed.

    Attributes:
        versions: Of the packages that matter, by name; absent ones are left out.
    """

    python: str
    versions: dict[str, str]


class Nixl(_Fact, frozen=True):
    """
    What became of a NIXL agent that was made for a trial.

    Attributes:
        plugins: Its backends.
        error: Why it could not be made with UCX; empty if it could.
    """

    plugins: list[str]
    error: str = ""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU that this process sees."""

    index: int
    name: str
    capability: str
    memory_bytes: int
    free_memory_bytes: int


class DevicePair(msgspec.Struct, frozen=True, kw_only=True):
    """
    Two GPUs.

    Attributes:
        peers: Whether each reaches the other's memory.
        link: What is between them, in nvidia-smi's words (NV18, PIX, PHB, NODE, SYS); empty if unknown.
    """

    one: int
    other: int
    peers: bool
    link: str


class Devices(_Fact, frozen=True):
    """
    The GPUs, or that there are none.

    Attributes:
        driver: Version of NVIDIA's driver; empty if nvidia-smi does not tell.
        driver_error: Why not; empty if there is neither tool nor device.
        torch: Version of torch.
        cuda: CUDA version that torch is built for; empty for a CPU build.
        error: Why torch cannot use the devices; empty if it can, or if it is a CPU build.
    """

    driver: str
    driver_error: str
    torch: str
    cuda: str
    devices: list[Device]
    pairs: list[DevicePair]
    error: str = ""


class Backend(_Fact, frozen=True):
    """
    The attention backend that vLLM would choose for an ordinary model: bfloat16, heads of 128.

    Attributes:
        name: In vLLM's words, with FlashAttention's version (`FLASH_ATTN_3`).
        error: Why vLLM could not be asked.
    """

    name: str
    error: str = ""


class Started(_Fact, frozen=True):
    """
    Two instances of the trial have started and know each other.

    Attributes:
        seconds: Until both had started and shaken hands.
        backend: Attention backend of the tiny model, which is float32.
    """

    seconds: float
    device: str
    backend: str
    kv_tokens: int


class Move(_Fact, frozen=True):
    """
    A request that moved once, against the same request without a move.

    Attributes:
        source, target: Instances.
        context_tokens: Of its prompt.
        pulled: Whether the target pulled the KV cache rather than recomputed it.
        refusal: Why the request was not cut; empty if it was.
        tokens: Of the text.
        differs_at: Index of the first token that is another one; None if the texts are the same.
        gap_s: Mean time between its tokens without a move.
        pause_s: From the source's last token to the target's first.
    """

    source: str
    target: str
    context_tokens: int
    pulled: bool
    refusal: str
    tokens: int
    differs_at: int | None
    gap_s: float
    pause_s: float


class Carriers(_Fact, frozen=True):
    """
    What UCX said it would move KV blocks with, between the trial's two instances.

    Attributes:
        transports: UCX's names, such as `cuda_ipc`, `tcp`, `cma`; empty if it said nothing.
    """

    transports: list[str]


class Mixed(_Fact, frozen=True):
    """
    A batch of mixed lengths against one of equal lengths, of the same count and total.

    Attributes:
        what: What was timed.
        batch: The mixed batch.
        ratio: Median time of the mixed batch over that of the equal one.
        samples: Timed steps or calls of each.
        prompt_tokens: Of a prompt computed beside them.
        error: Why it was not measured; then the ratio is 0.
    """

    what: str
    batch: str
    ratio: float
    samples: int
    prompt_tokens: int = 0
    error: str = ""


class Door(_Fact, frozen=True):
    """
    What an engine that others have started answered at its door.

    Attributes:
        address: HOST:PORT.
        node, version: As it tells; empty if it does not.
        refused: Whether who listens there does not have the key.
        error: Why there is no answer.
        seconds: Until the answer.
    """

    address: str
    node: str = ""
    version: str = ""
    refused: bool = False
    error: str = ""
    seconds: float = 0.0


Fact: TypeAlias = (
    Doing | HostName | Machine | Software | Nixl | Devices | Backend | Started | Move | Carriers | Mixed | Door
)
DECODER: Final = msgspec.json.Decoder(Fact)


class End(enum.StrEnum):
    """How a part ended."""

    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True)
class Gathered:
    """
    What a part brought.

    Attributes:
        facts: In the order of their coming.
        doing: What it did last; empty if it did not say.
        code: Its exit code; negative: the signal that ended it.
        seconds: Time taken.
        limit_s: Time it had.
        output: The end of what it printed, if it was not done.
    """

    part: str
    end: End
    facts: tuple[Fact, ...] = ()
    doing: str = ""
    code: int = 0
    seconds: float = 0.0
    limit_s: float = 0.0
    output: str = ""
