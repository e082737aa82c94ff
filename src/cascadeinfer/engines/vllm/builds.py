"""The engine arguments of each build that instances of this server are, or were, started with."""

import dataclasses
from collections.abc import Callable, Sequence

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.other_build import (
    Key,
    cache_key,
    changes_in,
    check_code,
    check_same_service,
    differences,
    mark_of,
    model_key,
)
from cascadeinfer.engines.vllm.refused_options import vllm_refusals


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """
    A build and what it stands for.

    Attributes:
        said: The arguments as the operator has put them.
        engine_args: The same for its instances, which must hold all that the front end lets in.
        keys: Of its model and of its KV cache, when it was prepared.
    """

    build: Build
    said: AsyncEngineArgs
    engine_args: AsyncEngineArgs
    keys: tuple[Key, Key]


class Builds:
    """See the module header."""

    def __init__(self, said: AsyncEngineArgs, engine_args: AsyncEngineArgs) -> None:
        """
        Args:
            said: What the operator has said at the server's start.
            engine_args: The same with each instance's share of this machine's memory.
        """
        keys = model_key(said), cache_key(said)
        self._made = {FIRST_BUILD: Prepared(FIRST_BUILD, said, engine_args, keys)}
        self._versions = {keys[0]: FIRST_BUILD.model_version}
        self._groups = {keys[1]: FIRST_BUILD.kv_group}

    def args_of(self, build: Build) -> AsyncEngineArgs:
        """For the configuration of an instance of a build."""
        return self._made[build].engine_args

    def said_of(self, build: Build) -> AsyncEngineArgs:
        """As the operator has put them."""
        return self._made[build].said

    def mark_of(self, build: Build) -> str:
        """What engines of a build say of themselves, see `knocking.About`."""
        prepared = self._made[build]
        return mark_of(prepared.said, prepared.keys)

    def prepare(self, current: Build, options: Sequence[str], max_model_len: int) -> Prepared:
        """
        What a build becomes with other options; one that was made before if it would be the same.

        Args:
            current: The build that the options change.
            options: Words of a command line.
            max_model_len: What the front end lets in, in tokens.

        Raises:
            ConfigError: An option is unknown or cannot be changed.
        """
        said = dataclasses.replace(self._made[current].said, **changes_in(options))
        keys = model_key(said), cache_key(said)
        if (same := next((p for p in self._made.values() if (p.said, p.keys) == (said, keys)), None)) is not None:
            return same
        build = Build(
            len(self._made),
            differences(self._made[FIRST_BUILD].said, said),
            self._versions.setdefault(keys[0], f"model {len(self._versions)}"),
            self._groups.setdefault(keys[1], f"cache {len(self._groups)}"),
        )
        engine_args = dataclasses.replace(said, max_model_len=max_model_len)
        if engine_args.kv_cache_memory_bytes is None:
            engine_args.kv_cache_memory_bytes = self.args_of(FIRST_BUILD).kv_cache_memory_bytes
        return Prepared(build, said, engine_args, keys)

    def checked(
        self,
        current: Build,
        options: Sequence[str],
        max_model_len: int,
        config_of: Callable[[AsyncEngineArgs], VllmConfig],
    ) -> Prepared:
        """
        What `prepare` makes, once vLLM has made its configuration and the front end could go on with it.

        Args:
            current: See `prepare`.
            options: Likewise.
            max_model_len: Likewise.
            config_of: Makes a configuration.

        Raises:
            ConfigError: See `prepare`; or vLLM refuses the options, or the model is another one.
        """
        prepared = self.prepare(current, options, max_model_len)
        is_other_model = prepared.build.model_version != current.model_version
        if is_other_model:
            check_code(prepared.engine_args)
        with vllm_refusals():
            new = config_of(prepared.engine_args)
            if is_other_model:
                check_same_service(config_of(self.args_of(current)), new)
        return prepared

    def keep(self, prepared: Prepared) -> Build:
        """Instances of it may be started from now on."""
        self._made[prepared.build] = prepared
        return prepared.build
