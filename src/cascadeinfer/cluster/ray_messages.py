"""
What a server and the process beside it that speaks with Ray (`ray_side.py`) say to each other.

A question has a number, and gets one answer with that number. What happens to engines is told without a question.
Engines of one instance are known by its id; the process knows one fleet.
"""

from typing import Final, Literal, TypeAlias

import msgspec

from cascadeinfer.cluster.keeping import Told
from cascadeinfer.core.errors import CascadeError, ConfigError, EngineError, ScalingRefusedError
from cascadeinfer.core.types import InstanceId


class Need(msgspec.Struct, frozen=True):
    """
    What one instance takes on its node.

    Attributes:
        cpus: As Ray counts them; on nodes without GPUs the engine gets so many cores.
        gpus: Devices; None: as many as it has workers if the cluster has devices at all.
        workers: Of one instance.
        others: Ray's custom resources.
    """

    cpus: int
    gpus: int | None
    workers: int
    others: dict[str, float] = {}


# --- questions -------------------------------------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True, tag=True):
    """
    Connect to a Ray cluster. The first question.

    Attributes:
        address: HOST:PORT of its head; None: the one of this machine.
        host: This machine's address in the cluster; None: Ray finds it out.
    """

    address: str | None
    host: str | None


class Take(msgspec.Struct, frozen=True, tag=True):
    """
    Use a fleet, from now on until this connection ends. The answer is None, or who uses it already.

    Attributes:
        fleet: Its name.
        user: Who asks, for others to read.
        asks_to_end: Ask whoever uses it to end.
        must_exist: Refuse to begin a fleet.
    """

    fleet: str
    user: str
    asks_to_end: bool = False
    must_exist: bool = False


class Find(msgspec.Struct, frozen=True, tag=True):
    """Which engines live? The answer has their ids; what happens to them is told from now on."""


class Check(msgspec.Struct, frozen=True, tag=True):
    """
    Is there room for more instances, and are the nodes fit for them? The answer has lines for the operator.

    Attributes:
        n_instances: More than live.
        need: Of each.
        path: Must exist on the nodes; None: nothing must.
        version: Of this program.
    """

    n_instances: int
    need: Need
    path: str | None
    version: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """
    Place an instance and start its engine under a keeper.

    Attributes:
        need: Of it.
        module, content, key, environment: See `keeping.EngineOrder`.
        version: Of this program.
    """

    instance_id: InstanceId
    need: Need
    module: str
    content: bytes
    key: str
    environment: dict[str, str]
    version: str

    def __repr__(self) -> str:
        """Without the key."""
        return f"Start({self.instance_id!r}, {self.need})"


class StopOne(msgspec.Struct, frozen=True, tag=True):
    """End an engine and free its place."""

    instance_id: InstanceId
    timeout_s: float


class KillOne(msgspec.Struct, frozen=True, tag=True):
    """End an engine at once."""

    instance_id: InstanceId


class ReadRecord(msgspec.Struct, frozen=True, tag=True):
    """What were the fleet's engines started with? As it was written, or None."""


class WriteRecord(msgspec.Struct, frozen=True, tag=True):
    """Engines are started with this from now on."""

    record: str


class ReadKey(msgspec.Struct, frozen=True, tag=True):
    """The fleet's key."""


class Forget(msgspec.Struct, frozen=True, tag=True):
    """The fleet has no engines any more: forget it."""


Question: TypeAlias = (
    Connect | Take | Find | Check | Start | StopOne | KillOne | ReadRecord | WriteRecord | ReadKey | Forget
)


class Ask(msgspec.Struct, frozen=True):
    """A question; its answer has its number."""

    number: int
    question: Question


# --- answers and news ------------------------------------------------------------------------------------------------

Value: TypeAlias = str | list[str] | None


class Answer(msgspec.Struct, frozen=True, tag=True):
    """An answer."""

    number: int
    value: Value = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """
    A question that has no answer.

    Attributes:
        kind: Whose fault it is: the operator's, an engine's, or that there is no room.
        message: In words.
        option: At fault, of the operator's.
        fix: What to do.
    """

    number: int
    kind: Literal["operator", "engine", "room"]
    message: str
    option: str | None = None
    fix: str | None = None

    def as_error(self, instance_id: InstanceId) -> CascadeError:
        """The exception that it stands for."""
        match self.kind:
            case "operator":
                return ConfigError(self.message, option=self.option, fix=self.fix)
            case "engine":
                return EngineError(self.message, instance_id=instance_id)
            case "room":
                return ScalingRefusedError(self.message)

    @staticmethod
    def of(number: int, error: CascadeError) -> "Failed":
        """What an exception says; the instance's name is the asker's to add."""
        if isinstance(error, ConfigError):
            plain = str(error).removeprefix(f"{error.option}: ").removesuffix(f" ({error.fix})")
            return Failed(number, "operator", plain, error.option, error.fix)
        if isinstance(error, EngineError):
            return Failed(number, "engine", str(error).removeprefix(f"instance {error.instance_id}: "))
        return Failed(number, "room", str(error))


class Heard(msgspec.Struct, frozen=True, tag=True):
    """
    An engine's state has changed.

    Attributes:
        told: What its keeper says.
        stage: How far its start is, in words.
        node: The address of its machine.
    """

    instance_id: InstanceId
    told: Told
    stage: str | None = None
    node: str | None = None


class AskedToEnd(msgspec.Struct, frozen=True, tag=True):
    """Somebody stops the fleet: its server is to end."""


FromSide: TypeAlias = Answer | Failed | Heard | AskedToEnd
ADDRESS_OPTION: Final = "--ray-address"
FLEET_OPTION: Final = "--fleet"
INSTANCES_OPTION: Final = "--instances"
