"""
The builds of a fleet's engines, for a rolling update.

The fleet's record says what its engines were started with, for the next server. While engines of several builds run, it
also says what an update has changed for some of them, and each engine says of which kind it is (its mark), so that a
server that comes back in the middle goes on with all.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Collection, Sequence

from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.fleet import Update
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.builds import Builds
from cascadeinfer.engines.vllm.configuration import attached_config
from cascadeinfer.engines.vllm.kept_order import Content
from cascadeinfer.engines.vllm.other_build import differences
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
        write: Callable[[AsyncEngineArgs, tuple[Update, ...]], Awaitable[None]],
    ) -> None:
        """
        Args:
            said: What the operator has said at the server's start.
            content: For engines that are started; the instance's name is filled in.
            terms: Of attaching to them.
            has_room: Whether there is a place, see `EngineSource.has_room`.
            check: Whether the fleet's machines are fit for this model, see `EngineSource.check`.
            write: Writes the fleet's record: the options of its engines, and what an update has changed of them for
                some.
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

    def of_marks(self, updates: Collection[Update]) -> dict[str, Build]:
        """
        The build of each mark that engines of an unfinished update have. Blocks for seconds.

        Args:
            updates: Of the record that the server has found, whose options are those of the server.

        Raises:
            ConfigError: See `prepare`.
        """
        length = self._terms[FIRST_BUILD].config.model_config.max_model_len
        words = ([part for word in update.words for part in word.split(" ", 1)] for update in updates)
        builds = [FIRST_BUILD, *(self.prepare(FIRST_BUILD, each, length) for each in words)]
        return {self._builds.mark_of(build): build for build in builds}

    @property
    def own_mark(self) -> str:
        """Of engines with the options of this server."""
        return self._builds.mark_of(FIRST_BUILD)

    async def check(self, build: Build) -> None:
        """See `EngineSource.check`."""
        await self._check(self._builds.args_of(build).model)

    def content_of(self, build: Build) -> Content:
        """For engines of a build."""
        mark = self._builds.mark_of(build)
        return dataclasses.replace(self._content, engine_args=self._builds.args_of(build), mark=mark)

    def terms_of(self, build: Build) -> Terms:
        """Of attaching to engines of a build."""
        return self._terms[build]

    async def note(self, current: Build, builds: Collection[Build]) -> None:
        """
        Engines of these builds run or are about to; raises OSError if that cannot be written down.

        The record's options are those of `current`, the server's build, as long as any engine has it: a server that
        comes back is started with them.
        """
        base, *others = sorted(builds, key=lambda build: (build != current, build.number))
        said = self._builds.said_of(base)
        updates = (
            Update(differences(said, self._builds.said_of(other)), self._builds.mark_of(other)) for other in others
        )
        await self._write(said, tuple(updates))
