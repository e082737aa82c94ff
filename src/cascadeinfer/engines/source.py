"""Where the engines of instances come from that are added, or replaced, while others run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.build import Build
from cascadeinfer.engines.protocol import Engine


class EngineSource(Protocol):
    """
    Makes engines for instances that are added while others run.

    Attributes:
        build: Of instances that are added from now on.
    """

    build: Build

    @property
    def own_builds(self) -> Mapping[InstanceId, Build]:
        """Of instances of the start that have engine options of their own, which no update may change."""
        ...

    @property
    def first_builds(self) -> Mapping[InstanceId, Build]:
        """Of those instances of the start that are of another build than the server's own."""
        ...

    def prepare(self, options: Sequence[str]) -> Build:
        """
        Check engine options for instances that replace others. Blocks for seconds, and is called in a thread.

        Args:
            options: Words of a command line: what changes against `build`.

        Returns:
            What `place` takes; equal for equal options.

        Raises:
            ConfigError: These options, or those of instances here at all, cannot be changed while others run.
        """
        ...

    async def note(self, builds: Collection[Build]) -> None:
        """
        Instances of these builds run, or are about to: what outlives this process must tell the next one.

        Raises:
            OSError: It cannot be told.
        """
        ...

    async def check(self, build: Build) -> None:
        """
        Look whether the machines on which instances are started are fit for a build.

        Raises:
            ConfigError: One is not: it lacks the model, for example.
            ScalingRefusedError: They cannot be asked now.
        """
        ...

    async def has_room(self, *, shared: bool) -> bool:
        """
        Whether there is a place that no instance has; if `shared`, one that instances may share counts as well.

        Raises:
            ScalingRefusedError: Nobody can say now.
        """
        ...

    def place(self, instance_id: InstanceId, build: Build | None = None) -> Callable[[int], Engine]:
        """
        Find a place (cores, devices, memory) for one more instance.

        Args:
            instance_id: Its name.
            build: What it is started with; None: as `build` says.

        Returns:
            What makes its engine for the n-th start.

        Raises:
            ScalingRefusedError: There is no place left.
        """
        ...

    def release(self, instance_id: InstanceId) -> None:
        """The instance is gone for good: free its place."""
        ...
