"""Divides the cores or devices of one machine among instances, including those added later."""

import logging
from collections import Counter
from collections.abc import Sequence

from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.core.types import InstanceId

logger = logging.getLogger(__name__)


def split_cores(n_instances: int, cores: Sequence[int], n_ranks: int = 1) -> list[str]:
    """
    Cores per instance in vLLM's notation (`VLLM_CPU_OMP_THREADS_BIND`), e.g. `0,1`, `2,3`, or `0|1`, `2|3` for two
    workers (ranks) per instance.

    With fewer cores than ranks, the ranks share cores in turn, which keeps those of one instance apart: they wait for
    each other in every layer. Left-over cores stay free for the front end and for instances added later.
    """
    if not cores:
        raise ConfigError("this process may run on no core", option="CPU affinity")
    n_shares = n_instances * n_ranks
    if len(cores) < n_shares:
        return _of_ranks([str(cores[i % len(cores)]) for i in range(n_shares)], n_ranks)
    return _of_ranks(_shares(cores[: len(cores) // n_shares * n_shares], len(cores) // n_shares), n_ranks)


def _shares(cores: Sequence[int], each: int) -> list[str]:
    """Full shares of this many cores; what is left over is left out."""
    return [",".join(str(core) for core in cores[i : i + each]) for i in range(0, len(cores) - each + 1, each)]


def _of_ranks(shares: Sequence[str], n_ranks: int) -> list[str]:
    """The shares of each full set of ranks in vLLM's notation."""
    return ["|".join(shares[i : i + n_ranks]) for i in range(0, len(shares) - n_ranks + 1, n_ranks)]


def split_devices(n_instances: int, devices_per_instance: int, visible: Sequence[str]) -> list[str]:
    """
    `CUDA_VISIBLE_DEVICES` per instance.

    Raises:
        ConfigError: There are fewer devices than the instances need, and not exactly one to share.
    """
    needed = n_instances * devices_per_instance
    if len(visible) >= needed:
        return [
            ",".join(visible[i * devices_per_instance : (i + 1) * devices_per_instance]) for i in range(n_instances)
        ]
    if len(visible) == 1 and devices_per_instance == 1:
        return [visible[0]] * n_instances  # instances share one device: lower --gpu-memory-utilization
    enough_for = len(visible) // devices_per_instance
    raise ConfigError(
        f"{n_instances} instances of {devices_per_instance} device(s) need {needed} devices, "
        f"{len(visible)} are visible",
        option="--instances",
        fix=f"{f'use --instances {enough_for} or ' if enough_for else ''}make more devices visible",
    )


class Places:
    """
    The places of this machine (cores or devices), each for one instance or shared by several; taken and given back.

    An instance added later gets a vacated place if there is one, then one never used, then, where sharing is allowed,
    the place with the fewest instances.
    """

    def __init__(self, dealt: Sequence[str], spare: Sequence[str], *, may_share: bool) -> None:
        """
        Args:
            dealt: A place for each initial instance; a place named twice holds two.
            spare: Further places.
            may_share: Whether further instances may share places.
        """
        self._room = Counter([*dealt, *spare])
        self._place_of: dict[InstanceId, str] = {}
        self._may_share = may_share

    def has_room(self, *, shared: bool) -> bool:
        """Whether a place has room for one more instance; if `shared`, beyond what it was made for."""
        used = Counter(self._place_of.values())
        return (shared and self._may_share) or any(used[place] < room for place, room in self._room.items())

    def take(self, instance_id: InstanceId) -> str:
        """
        A place for one more instance.

        Raises:
            ScalingRefusedError: All are taken.
        """
        used = Counter(self._place_of.values())
        place = next((p for p, room in self._room.items() if used[p] < room), None)
        if place is None:
            if not self._may_share:
                raise ScalingRefusedError(
                    f"no device left: {', '.join(p for p, room in self._room.items() if room)} have an instance each "
                    "(drain one, or start the server with more devices)"
                )
            place = min((p for p, room in self._room.items() if room), key=lambda p: used[p] / self._room[p])
            logger.warning("instance %s shares cores %s with others: there are no free ones", instance_id, place)
        self._place_of[instance_id] = place
        return place

    def hold(self, instance_id: InstanceId, place: str) -> None:
        """An instance has this place already, since before; it may be one that is not dealt out any more."""
        self._room.setdefault(place, 0)
        self._place_of[instance_id] = place

    def give_back(self, instance_id: InstanceId) -> None:
        """The instance is gone."""
        del self._place_of[instance_id]


def core_places(n_instances: int, cores: Sequence[int], n_ranks: int = 1) -> Places:
    """Cores for this many instances and for later ones: left-over cores first, then shared ones."""
    dealt = split_cores(n_instances, cores, n_ranks)
    each = max(1, len(cores) // (n_instances * n_ranks))
    spare = _of_ranks(_shares(cores[each * n_instances * n_ranks :], each), n_ranks)
    return Places(dealt, spare, may_share=True)


def device_places(n_instances: int, devices_per_instance: int, visible: Sequence[str]) -> Places:
    """
    Devices for this many instances and for later ones. Only a single device is shared.

    Raises:
        ConfigError: There are too few for the initial instances.
    """
    dealt = split_devices(n_instances, devices_per_instance, visible)
    rest = visible[n_instances * devices_per_instance :]
    n_spare = len(rest) // devices_per_instance
    spare = [",".join(rest[i * devices_per_instance : (i + 1) * devices_per_instance]) for i in range(n_spare)]
    return Places(dealt, spare, may_share=len(visible) == 1)
