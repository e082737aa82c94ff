"""
The builds of a fleet's engines, for a rolling update.

The fleet's record says what its engines were started with, for the next server. While engines of several builds run, it
also says that an update is unfinished, so that a server that comes back in the middle takes none for another.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Collection, Sequence

from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.builds import Builds
from cascadeinfer.engines.vllm.configuration import attached_config
from cascadeinfer.engines.vllm.kept_order import Content
from cascadeinfer.engines.vllm.standing import Terms


class KeptBuilds:
    """See the module header."""

    def __init__(
        self,
        said: AsyncEngineArgs,
        content: Content,
        terms: Terms,
        *,
        has_room: Callable[[bool], Awaitable[bool]],
        check: Callable[[str], Awaitable[None]],
        write: Callable[[AsyncEngineArgs, str], Awaitable[None]],
    ) -> None:
        """
        Args:
            said: What the operator has said at the server's start.
            content: For engines that are started; the instance's name is filled in.
            terms: Of attaching to them.
            has_room: Whether there is a place, see `EngineSource.has_room`.
            check: Whether the fleet's machines are fit for this model, see `EngineSource.check`.
            write: Writes the fleet's record: the options of its engines, and what a server that comes back must hear
                instead, if not empty.
        """
        self._builds = Builds(said, content.engine_args)
        self._content = content
        self._terms = {FIRST_BUILD: terms}
        self._write = write
        self._check = check
        self.has_room = has_room

    def prepare(self, current: Build, options: Sequence[str], max_model_len: int) -> Build:
        """See `EngineSource.prepare` and `Builds.prepare`."""
        prepared = self._builds.checked(current, options, max_model_len, attached_config)
        terms = self._terms[FIRST_BUILD]
        self._terms.setdefault(prepared.build, dataclasses.replace(terms, config=attached_config(prepared.engine_args)))
        return self._builds.keep(prepared)

    async def check(self, build: Build) -> None:
        """See `EngineSource.check`."""
        await self._check(self._builds.args_of(build).model)

    def content_of(self, build: Build) -> Content:
        """For engines of a build."""
        return dataclasses.replace(self._content, engine_args=self._builds.args_of(build))

    def terms_of(self, build: Build) -> Terms:
        """Of attaching to engines of a build."""
        return self._terms[build]

    async def note(self, builds: Collection[Build]) -> None:
        """Engines of these builds run or are about to; raises OSError if that cannot be written down."""
        first, *others = sorted(builds, key=lambda build: build.number)
        words = [" ".join(build.options) or "the options before" for build in (first, *others)]
        await self._write(self._builds.said_of(first), " and ".join(words) if others else "")
