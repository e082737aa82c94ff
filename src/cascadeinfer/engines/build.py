"""What instances are started with, in a rolling update."""

from dataclasses import dataclass
from typing import Final

from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.types import InstanceCapacity, InstanceId


@dataclass(frozen=True, slots=True)
class Build:
    """
    What instances are started with, restarts included, as far as somebody must tell them apart.

    Attributes:
        number: 0 of the server's start, then counted.
        options: What the operator has changed since the start, in words: `--max-num-seqs 64`.
        model_version: See InstanceKind.
        kv_group: Likewise.
    """

    number: int = 0
    options: tuple[str, ...] = ()
    model_version: str = ""
    kv_group: str = ""

    def kind(self, capacity: InstanceCapacity) -> InstanceKind:
        """The kind of an instance of this build with this capacity."""
        return InstanceKind(capacity, model_version=self.model_version, kv_group=self.kv_group)


FIRST_BUILD: Final = Build()


@dataclass(frozen=True, slots=True)
class Origin:
    """
    Where an instance comes from.

    Attributes:
        build: What it is started with.
        replaces: The instance whose place among the stages it takes over, or None.
    """

    build: Build = FIRST_BUILD
    replaces: InstanceId | None = None


FIRST_ORIGIN: Final = Origin()
