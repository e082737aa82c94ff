"""
The engines of a named fleet: those that live are adopted, others are started, and all of them outlive the server.

    async with fleet_engines(...) as fleet:
        runtime = Runtime(fleet.make_engines(), ..., source=fleet.source)
        ...                     the start; when it fails, what it has started ends with it
        with fleet.serving():
            ...                 the server's life
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from functools import partial

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer import __version__
from cascadeinfer.cluster.fleet import OPTION, Record, Update
from cascadeinfer.cluster.fleets import UsedFleet
from cascadeinfer.cluster.keeping import Keepers
from cascadeinfer.cluster.knocking import KeyRefusedError
from cascadeinfer.cluster.local_keepers import Rooms
from cascadeinfer.cluster.places import Places
from cascadeinfer.cluster.ray_link import SideLostError
from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.core.errors import ConfigError, EngineError, ScalingRefusedError
from cascadeinfer.core.placing.evacuation import MAX_MIGRATIONS_PER_INSTANCE
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.vllm.configuration import KvTransferSettings, attached_config, with_cpu_kv_share
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.kept import KeptSource, Phase
from cascadeinfer.engines.vllm.kept_builds import KeptBuilds
from cascadeinfer.engines.vllm.kept_order import Content
from cascadeinfer.engines.vllm.launch import places_for
from cascadeinfer.engines.vllm.other_build import CHANGEABLE
from cascadeinfer.engines.vllm.refused_options import check_engine_args, engine_default
from cascadeinfer.engines.vllm.standing import Terms, look_at

logger = logging.getLogger(__name__)

CHANGEABLE_FLAGS = frozenset("--" + name.replace("_", "-") for name in CHANGEABLE)
OF_THE_FRONT_END = frozenset({"model", "use_tqdm_on_load", "enable_log_requests"})
"""Engine arguments that two servers of one fleet may differ in, and the one that is named by itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class FleetTerms:
    """
    What a server asks of its fleet.

    Attributes:
        n_instances: At least so many.
        lease_s: How long engines keep the blocks of a request that moves away.
        orphan_timeout_s: Engines end when no front end has been attached for so long; 0: never.
        log_stats: Whether steps carry statistics for vLLM's metrics.
        own_log_level: The least level of our own lines in the engines' logs.
        own_host: The address on which engines reach this server; None: the one by which they are reached.
        n_front_ends: Processes of this server that use them; the engines do not depend on it.
    """

    n_instances: int
    lease_s: int
    orphan_timeout_s: float
    log_stats: bool
    own_log_level: str
    own_host: str | None = None
    n_front_ends: int = 1


class FleetEngines:
    """See the module header."""

    def __init__(
        self,
        fleet: UsedFleet,
        keepers: Keepers,
        found: tuple[InstanceId, ...],
        source: KeptSource,
        ids: tuple[InstanceId, ...],
    ) -> None:
        """
        Args:
            fleet: Used by this process.
            keepers: Its.
            found: Instances whose engines lived when the server came.
            source: Makes engines.
            ids: All instances of the start.
        """
        self.source = source
        self._fleet = fleet
        self._keepers = keepers
        self._found = found
        self._ids = ids

    def make_engines(self) -> dict[InstanceId, Callable[[int], VllmInstance]]:
        """What makes the engines of the server's start. Raises ScalingRefusedError if there is no room for them."""
        # Those that live have their places already: the others get what is left.
        placed = {each: self.source.place(each) for each in sorted(self._ids, key=lambda each: each not in self._found)}
        return {instance_id: placed[instance_id] for instance_id in self._ids}

    def stage(self, instance_id: InstanceId) -> str | None:
        """How far an instance's start is."""
        return "attaching" if instance_id in self._found else self._keepers.stage(instance_id)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """In this context the start is over; afterwards the server ends, and engines that are up go on."""
        self.source.phase = Phase.SERVES
        try:
            yield
        finally:
            self.source.phase = Phase.ENDS

    def first_lines(self, orphan_timeout_s: float) -> list[str]:
        """What the operator hears of it at the start."""
        new = [instance_id for instance_id in self._ids if instance_id not in self._found]
        lines = []
        if self._found:
            lines.append(f"fleet {self._fleet.name}: {_counted(len(self._found))} found alive, adopted")
        if new:
            lines.append(f"fleet {self._fleet.name}: {_counted(len(new))} started; logs {self._fleet.logs}")
        wait = f"; without a server they end after {orphan_timeout_s:g} s" if orphan_timeout_s else ""
        if self.source.first_builds:
            kinds = [f"{name} has {' '.join(build.options)}" for name, build in self.source.first_builds.items()]
            lines.append(
                f"fleet {self._fleet.name}: an update was not finished: instance {', '.join(kinds)} (to go on, roll to "
                "these options again; to go back, roll without options)"
            )
        return [*lines, f"its engines outlive this server ({self._fleet.stop_command} ends them{wait})"]


def _counted(n: int) -> str:
    return f"{n} engine{'s' if n != 1 else ''}"


def record_of(engine_args: AsyncEngineArgs, terms: FleetTerms) -> Record:
    """What engines are started with, as far as a server must agree with those that it finds."""
    options = {"--kv-lease-s": str(terms.lease_s)} | ({} if terms.log_stats else {"--disable-log-stats": "True"})
    names = [field.name for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")]
    return Record(__version__, vllm.__version__, engine_args.model, options | _set_options(engine_args, names))


def _set_options(engine_args: AsyncEngineArgs, names: Iterable[str]) -> dict[str, str]:
    return {
        "--" + name.replace("_", "-"): str(value)
        for name in names
        if name not in OF_THE_FRONT_END and (value := getattr(engine_args, name)) != engine_default(name)
    }


def updated(record: Record, engine_args: AsyncEngineArgs, updates: tuple[Update, ...]) -> Record:
    """
    A record after, or in the middle of, a rolling update to these arguments.

    Only what an update can change is read from them: configurations among the others, such as that of a profiler, have
    been completed since the record was made, and would differ from what the next server asks for.
    """
    kept = {flag: value for flag, value in record.options.items() if flag not in CHANGEABLE_FLAGS}
    options = kept | _set_options(engine_args, sorted(CHANGEABLE))
    return Record(record.version, record.vllm, engine_args.model, options, updates)


@contextlib.asynccontextmanager
async def fleet_engines(
    fleet: UsedFleet, engine_args: AsyncEngineArgs, terms: FleetTerms
) -> AsyncIterator[FleetEngines]:
    """
    In this context, this server uses a fleet; it says which engines it has found there.

    Args:
        fleet: Used by this process.
        engine_args: The operator's, for all instances alike.
        terms: What is asked of the fleet.

    Raises:
        ConfigError: Its engines run with other options, or vLLM refuses these.
    """
    check_engine_args(engine_args)
    asked = record_of(engine_args, terms)
    shared = with_cpu_kv_share(engine_args, terms.n_instances) if fleet.is_here else engine_args
    places = places_for(shared, terms.n_instances) if fleet.is_here else None

    def rooms() -> Rooms:
        assert places is not None, "nothing is started on this machine"
        return places

    keepers = fleet.keepers(rooms)
    found = tuple(sorted(await keepers.find(), key=_by_number))
    try:
        runs = await fleet.record()
        _check(fleet, asked, runs, found)
        new = missing(terms.n_instances, found)
        if new:
            for line in await fleet.check(len(new), engine_args.model):
                logger.warning("%s", line)
        config = attached_config(dataclasses.replace(engine_args, _api_process_count=terms.n_front_ends))
        key = await fleet.key()
        settings = KvTransferSettings(terms.lease_s, MAX_MIGRATIONS_PER_INSTANCE)
        content = Content("", shared, settings, terms.log_stats, terms.own_log_level, terms.orphan_timeout_s)
        standing = Terms(config, ClusterKey.of(key), terms.lease_s, MAX_MIGRATIONS_PER_INSTANCE, terms.own_host)
        builds = KeptBuilds(
            engine_args,
            content,
            standing,
            has_room=partial(has_room, fleet, places, engine_args.model),
            check=partial(check_nodes, fleet),
            write=partial(_write_updated, fleet, asked),
        )
        source = KeptSource(keepers, found, builds, key, {})
        if found and runs is not None and runs.updates:
            source.first_builds = await _left_by_an_update(fleet, keepers, found, builds, runs, asked, standing.key)
        if source.first_builds:
            await builds.note(FIRST_BUILD, {FIRST_BUILD, *source.first_builds.values()})
        else:
            await fleet.write(asked)
        engines = FleetEngines(fleet, keepers, found, source, tuple(sorted([*new, *found], key=_by_number)))
        for line in engines.first_lines(terms.orphan_timeout_s):
            logger.info("%s", line)
        yield engines
    finally:
        await keepers.leave()


async def _write_updated(
    fleet: UsedFleet, asked: Record, engine_args: AsyncEngineArgs, updates: tuple[Update, ...]
) -> None:
    """Raises OSError."""
    try:
        await fleet.write(updated(asked, engine_args, updates))
    except SideLostError as error:
        raise ConnectionError(str(error)) from error


async def has_room(fleet: UsedFleet, places: Places | None, model: str, shared: bool) -> bool:
    """
    Whether there is a place for one more engine.

    Args:
        fleet: Asked where its engines are elsewhere.
        places: Those of this machine, if they are here.
        model: Its model, which a node must have.
        shared: Whether one that engines may share counts as well.

    Raises:
        ScalingRefusedError: Nobody can say now.
    """
    if places is not None:
        return places.has_room(shared=shared)
    try:
        await fleet.check(1, model)
    except ConfigError:
        return False
    except SideLostError as error:
        raise ScalingRefusedError(str(error)) from error
    return True


async def check_nodes(fleet: UsedFleet, model: str) -> None:
    """
    Look whether the fleet's nodes are fit for a model.

    Raises:
        ConfigError: One is not.
        ScalingRefusedError: They cannot be asked now.
    """
    try:
        for line in await fleet.check(0, model):
            logger.warning("%s", line)
    except SideLostError as error:
        raise ScalingRefusedError(str(error)) from error


@contextlib.asynccontextmanager
async def engines_of(
    fleet: UsedFleet | None, engine_args: AsyncEngineArgs, terms: FleetTerms
) -> AsyncIterator[FleetEngines | None]:
    """`fleet_engines`, or nothing for a server whose engines end with it."""
    if fleet is None:
        yield None
        return
    async with fleet_engines(fleet, engine_args, terms) as engines:
        yield engines


def _check(fleet: UsedFleet, asked: Record, runs: Record | None, found: tuple[InstanceId, ...]) -> None:
    """Raises ConfigError if engines live that were started with something else."""
    if not found or runs is None:
        return
    if differences := runs.differences(asked, {*CHANGEABLE_FLAGS, "the model"} if runs.updates else ()):
        raise ConfigError(
            f"{_counted(len(found))} of {fleet.name} run with other options: {'; '.join(differences)}",
            option=OPTION,
            fix=f"use theirs, or end them first: {fleet.stop_command}",
        )


async def _left_by_an_update(
    fleet: UsedFleet,
    keepers: Keepers,
    found: tuple[InstanceId, ...],
    builds: KeptBuilds,
    runs: Record,
    asked: Record,
    key: ClusterKey,
) -> dict[InstanceId, Build]:
    """
    The builds of engines that an unfinished update has given other options than this server's.

    Raises:
        ConfigError: This server asks for options that only some have, or one has options that nobody knows.
    """
    told = await asyncio.gather(*(_mark_of(keepers, instance_id, key, builds.own_mark) for instance_id in found))
    marks = dict(zip(found, told, strict=True))
    if set(marks.values()) <= {builds.own_mark}:
        return {}
    if differences := runs.differences(asked):
        raise ConfigError(
            f"a rolling update of {fleet.name} was not finished ({runs.unfinished}), and this server differs from the "
            f"options before: {'; '.join(differences)}",
            option=OPTION,
            fix=f"use those, and roll again or back; or end the engines first: {fleet.stop_command}",
        )
    build_of = await asyncio.to_thread(builds.of_marks, runs.updates)
    if unknown := [instance_id for instance_id, mark in marks.items() if mark not in build_of]:
        raise ConfigError(
            f"a rolling update of {fleet.name} was not finished ({runs.unfinished}), and instance "
            f"{', '.join(unknown)} does not answer or has options that are not known",
            option=OPTION,
            fix=f"end the engines first: {fleet.stop_command}",
        )
    return {
        instance_id: build
        for instance_id, mark in marks.items()
        if mark is not None and (build := build_of[mark]) != FIRST_BUILD
    }


async def _mark_of(keepers: Keepers, instance_id: InstanceId, key: ClusterKey, of_new: str) -> str | None:
    """What an engine says of itself; None if it does not answer. One that has ended is started as a new one."""
    try:
        about = await look_at(await keepers.ready(instance_id), key)
    except EngineError:
        return of_new
    except KeyRefusedError as error:
        logger.warning("instance %s: %s", instance_id, error)
        return None
    return None if about is None else about.mark


def missing(n_instances: int, found: Collection[InstanceId]) -> list[InstanceId]:
    """Names of the instances to be started besides those that live, which may have any numbers."""
    free = (name for name in map(str, itertools.count()) if name not in found)
    return list(itertools.islice(free, max(0, n_instances - len(found))))


def _by_number(instance_id: InstanceId) -> tuple[int, str]:
    return (int(instance_id), "") if instance_id.isdecimal() else (1 << 30, instance_id)
