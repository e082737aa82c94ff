"""Turns vLLM's engine arguments into N instances: each one's place, configuration, environment and factory."""

import argparse
import contextlib
import copy
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial

from vllm import envs
from vllm.config import PoolerConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from cascadeinfer.cluster.local import LocalLauncher, usable_cores
from cascadeinfer.cluster.places import Places, core_places, device_places
from cascadeinfer.cluster.process_start import operator_environment
from cascadeinfer.cluster.protocol import Launcher, Place
from cascadeinfer.cluster.start_turns import StartTurns
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.kind import InstanceTerms
from cascadeinfer.core.refusals import why_not_step_budget
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.attached import AttachedCore
from cascadeinfer.engines.vllm.attachment import AnyAttachment
from cascadeinfer.engines.vllm.builds import Builds
from cascadeinfer.engines.vllm.configuration import (
    SIDE_CHANNEL_HOST_VARIABLE,
    KvTransferSettings,
    attached_config,
    environment_of,
    instance_config,
    n_ranks,
    with_cpu_kv_share,
)
from cascadeinfer.engines.vllm.connector.step_budget import step_budget_bounds
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.instance_logging import InstanceLogs
from cascadeinfer.engines.vllm.messages import EngineHello
from cascadeinfer.engines.vllm.other_build import changes_in, check_own_name
from cascadeinfer.engines.vllm.owned import OwnedCore
from cascadeinfer.engines.vllm.processes import VllmProcesses
from cascadeinfer.engines.vllm.refused_options import check_engine_args, vllm_refusals, what_is_wrong

logger = logging.getLogger(__name__)


def places_for(engine_args: AsyncEngineArgs, n_instances: int) -> Places:
    """Cores or devices for this many instances, and for those added later."""
    if current_platform.is_cpu():
        return core_places(n_instances, usable_cores(), n_ranks(engine_args))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(current_platform.device_count()))
    return device_places(n_instances, n_ranks(engine_args), visible.split(","))


def start_turns() -> StartTurns | None:
    """Devices are measured by engines that start, and cores are not. vLLM's own limit of a start is the limit of a
    turn.
    """
    return None if current_platform.is_cpu() else StartTurns(float(envs.VLLM_ENGINE_READY_TIMEOUT_S))


class VllmSource:
    """Makes the engines of one server's instances. See `cascadeinfer.engines.source.EngineSource`."""

    def __init__(
        self,
        engine_args: AsyncEngineArgs,
        n_instances: int,
        settings: KvTransferSettings,
        *,
        log_stats: bool,
        extra_environment: dict[str, str] | None = None,
        n_clients: int = 1,
        logs: InstanceLogs | None = None,
    ) -> None:
        """
        Args:
            engine_args: The operator's, for all instances alike.
            n_instances: How many there are at first; the machine is shared out among them.
            settings: Of the KV transfer.
            log_stats: Whether steps carry statistics for vLLM's metrics.
            extra_environment: More variables for the instances' processes.
            n_clients: Front-end processes that will use the instances.
            logs: How their processes log; None: as vLLM does.

        Raises:
            ConfigError: vLLM refuses the arguments (an unknown model folder, an impossible length), or ours contradict
                them.
        """
        check_engine_args(engine_args)
        self.build = FIRST_BUILD
        self.own_builds: dict[InstanceId, Build] = {}
        if logs is not None:
            engine_args = logs.args_for_all(engine_args)
        said, engine_args = engine_args, with_cpu_kv_share(engine_args, n_instances)
        self._builds = Builds(said, engine_args)
        self._settings = settings
        self._log_stats = log_stats
        self._extra_environment = extra_environment or {}
        self._n_clients = n_clients
        self._logs = logs
        self._n_placed = 0
        self._places = places_for(engine_args, n_instances)
        self._launcher: Launcher[VllmProcesses, EngineHello] = LocalLauncher[EngineHello](
            self._places, n_instances, _further_needs_bytes(engine_args), start_turns()
        )
        self._place_of: dict[InstanceId, Place] = {}
        with vllm_refusals():
            self._first_config: VllmConfig | None = instance_config(engine_args, "first", settings)
        self._budget_bounds = {FIRST_BUILD: step_budget_bounds(self._first_config)}

    @property
    def first_builds(self) -> Mapping[InstanceId, Build]:
        """See EngineSource."""
        return self.own_builds

    def give_own(self, options: Mapping[InstanceId, Sequence[str]]) -> None:
        """
        Give instances engine options of their own, before they are placed.

        Args:
            options: Words of a command line per instance, on top of the options of all.

        Raises:
            ConfigError: vLLM refuses them, or all instances must have the same.
        """
        assert self._first_config is not None, "instances have been placed"
        for instance_id, words in options.items():
            try:
                self.own_builds[instance_id] = self._own_build(words, self._first_config.model_config.max_model_len)
            except ConfigError as error:
                raise ConfigError(f"instance {instance_id}: {error}", option="--instance-args") from error

    def _own_build(self, words: Sequence[str], max_model_len: int) -> Build:
        changes_in(words, check_own_name)
        made: list[VllmConfig] = []

        def config_of(engine_args: AsyncEngineArgs) -> VllmConfig:
            made.append(instance_config(engine_args, "own", self._settings))
            return made[0]

        build = self._builds.keep(self._builds.checked(FIRST_BUILD, words, max_model_len, config_of))
        self._budget_bounds[build] = step_budget_bounds(made[0])
        return build

    def prepare(self, options: Sequence[str]) -> Build:
        """See EngineSource."""
        served = [kept.config.model_config.max_model_len for kept in self._launcher.living().values()]
        if not served:
            raise ConfigError("no instance is up", fix="wait until one is")
        prepared = self._builds.checked(
            self.build, options, min(served), lambda args: instance_config(args, "new", self._settings)
        )
        return self._builds.keep(prepared)

    async def note(self, builds: Collection[Build]) -> None:
        """See EngineSource: these engines end with the server."""

    async def check(self, build: Build) -> None:
        """See EngineSource: this machine has what was prepared here."""

    async def has_room(self, *, shared: bool) -> bool:
        """See EngineSource."""
        return self._places.has_room(shared=shared)

    def place(self, instance_id: InstanceId, build: Build | None = None) -> Callable[[int], VllmInstance]:
        """See EngineSource."""
        build = build or self.own_builds.get(instance_id, self.build)
        engine_args = self._builds.args_of(build)
        place = self._place_of[instance_id] = self._launcher.place(instance_id)
        index = int(instance_id) if instance_id.isdecimal() else self._n_placed
        environment = {
            **environment_of(place),
            **({} if self._logs is None else self._logs.environment),
            **self._extra_environment,
            SIDE_CHANNEL_HOST_VARIABLE: place.host,
        }
        self._n_placed += 1
        checked = self._first_config if build is FIRST_BUILD else None
        self._first_config = None
        new_config = partial(instance_config, engine_args, instance_id, self._settings)
        log_as = contextlib.nullcontext if self._logs is None else partial(self._logs.logging_as, instance_id)

        def make(start: int) -> VllmInstance:
            config = checked if checked is not None and start == 0 else new_config()
            core = OwnedCore(
                self._launcher,
                place,
                index,
                config,
                environment,
                log_stats=self._log_stats,
                n_clients=self._n_clients,
                max_migrations=self._settings.max_migrations,
                while_starting=log_as,
            )
            return VllmInstance(core)

        return make

    def check_budgets(self, terms: Mapping[InstanceId, InstanceTerms]) -> None:
        """
        Check chunk budgets before the first start.

        Args:
            terms: Per instance.

        Raises:
            ConfigError: An instance could not have one of them.
        """
        for instance_id, one in terms.items():
            if one.budget_tokens is None:
                continue
            least, most = self._budget_bounds[self.own_builds.get(instance_id, FIRST_BUILD)]
            if (why_not := why_not_step_budget(one.budget_tokens, least, most)) is not None:
                raise ConfigError(
                    why_not, option="--stages", fix="change it, --max-num-seqs or --max-num-batched-tokens"
                )

    def release(self, instance_id: InstanceId) -> None:
        """See EngineSource."""
        self._launcher.release(self._place_of.pop(instance_id))


def _further_needs_bytes(engine_args: AsyncEngineArgs) -> float:
    """Memory of its KV blocks, which an instance on a CPU must find free; a device checks by itself."""
    if not current_platform.is_cpu():
        return 0.0
    each = engine_args.kv_cache_memory_bytes or 2**30 * float(operator_environment().get("VLLM_CPU_KVCACHE_SPACE") or 0)
    return each * n_ranks(engine_args)


def make_factories(
    engine_args: AsyncEngineArgs,
    instance_ids: tuple[InstanceId, ...],
    settings: KvTransferSettings,
    *,
    log_stats: bool,
    extra_environment: dict[str, str] | None = None,
    n_clients: int = 1,
) -> dict[InstanceId, Callable[[int], VllmInstance]]:
    """
    Per instance, what makes its engine for the n-th start; for a fixed set of instances.

    Raises:
        ConfigError: See VllmSource.
    """
    source = VllmSource(
        engine_args,
        len(instance_ids),
        settings,
        log_stats=log_stats,
        extra_environment=extra_environment,
        n_clients=n_clients,
    )
    return {instance_id: source.place(instance_id) for instance_id in instance_ids}


def attached_factories(
    engine_args: AsyncEngineArgs,
    client_index: int,
    attach: Callable[[AttachedCore], Awaitable[AnyAttachment]],
) -> Callable[[InstanceId], Callable[[int], VllmInstance]]:
    """
    Per instance that another process owns, what makes a further client of it for the n-th time.

    Args:
        engine_args: The operator's; what an instance's start has changed in the configuration comes with the
            attachment.
        client_index: This process's number among the clients.
        attach: See AttachedCore.
    """
    config = attached_config(engine_args)

    def make_maker(instance_id: InstanceId) -> Callable[[int], VllmInstance]:
        return lambda _: VllmInstance(AttachedCore(instance_id, copy.deepcopy(config), client_index, attach))

    return make_maker


def parse_engine_args(namespace: argparse.Namespace) -> AsyncEngineArgs:
    """
    The engine arguments of a parsed command line. Finds the model, on disk or in the hub.

    Raises:
        ConfigError: vLLM refuses them, or there is no such model.
    """
    try:
        with vllm_refusals():
            engine_args = AsyncEngineArgs.from_cli_args(namespace)
    except ConfigError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise ConfigError(
            f"{namespace.model} cannot be found: {what_is_wrong(error.__cause__)}",
            option="MODEL",
            fix="name a Hugging Face folder or a repository within reach",
        ) from error
    if not getattr(namespace, "enable_flash_late_interaction", True):  # an option of the server that the engines need
        pooler = engine_args.pooler_config or PoolerConfig()
        pooler.enable_flash_late_interaction = False
        engine_args.pooler_config = pooler
    return engine_args
