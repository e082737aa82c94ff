"""The nodes of a Ray cluster: what they have, how many instances fit, whether they are fit for them."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import ray
import ray.exceptions
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cascadeinfer.cluster.ray_actors import look_at_node
from cascadeinfer.cluster.ray_messages import INSTANCES_OPTION, Need
from cascadeinfer.core.errors import ConfigError

NODE_TIMEOUT_S: Final = 120.0
"""For a process of Python to start on a node that is busy."""
ROOM_POLLS: Final = 20
ROOM_POLL_S: Final = 0.5
"""What has just ended counts as used for a moment."""


class Node(NamedTuple):
    """
    One node.

    Attributes:
        node_id: Ray's.
        address: In the cluster.
        total: Its resources.
        free: What nobody has of them.
    """

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def bundle_of(need: Need) -> dict[str, float]:
    """What an instance takes, as Ray counts it."""
    gpus = need.gpus
    if gpus is None:
        gpus = need.workers if ray.cluster_resources().get("GPU") else 0
    return {"CPU": need.cpus, **({"GPU": gpus} if gpus else {}), **need.others}


def nodes_now() -> list[Node]:
    """Those that live."""
    free = ray_state.available_resources_per_node()
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


async def check(n_instances: int, need: Need, path: str | None, version: str) -> list[str]:
    """See `ray_messages.Check`. Raises ConfigError."""
    bundle = await asyncio.to_thread(bundle_of, need)
    for left in reversed(range(ROOM_POLLS)):
        nodes = await asyncio.to_thread(nodes_now)
        if (room := sum(n_fitting(node.free, bundle) for node in nodes)) >= n_instances:
            break
        if not left:
            raise ConfigError(
                f"{n_instances} more instances of {in_words(bundle)} each asked, there is room for {room}: "
                f"{free_words(nodes, bundle)}",
                option=INSTANCES_OPTION,
                fix="ask for less, or add nodes: ray start --address=...",
            )
        await asyncio.sleep(ROOM_POLL_S)
    fit = [node for node in nodes if n_fitting(node.total, bundle)]
    looks = await asyncio.gather(*(_look(node, path) for node in fit))
    return [line for node, look in zip(fit, looks, strict=True) for line in judged(node.address, look, path, version)]


async def _look(node: Node, path: str | None) -> Any:
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    task = ray.remote(look_at_node).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return await asyncio.wait_for(task.remote(path), NODE_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ConfigError(
            f"node {node.address} cannot be used: {why(error)}", fix="install cascadeinfer there as here"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first line of an exception, without Ray's names of its processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[0]) if lines else type(error).__name__


def judged(address: str, look: Sequence[Any], path: str | None, version: str) -> list[str]:
    """
    Lines about what a node has.

    Raises:
        ConfigError: It is not fit.
    """
    theirs, vllm, has_path, has_name, has_token = look
    if theirs != version:
        raise ConfigError(
            f"node {address} has cascadeinfer {theirs}, this is {version}", fix="install one version everywhere"
        )
    if vllm is None:
        raise ConfigError(f"node {address} has no vLLM", fix="install cascadeinfer there as here")
    if not has_path:
        raise ConfigError(
            f"node {address} has no {path}", option="MODEL", fix="put the model on all nodes, under one path"
        )
    lines = []
    if not has_name:
        lines.append(f"node {address} cannot look up its own host name, which costs seconds at every start")
    if not has_token:
        lines.append(
            "this Ray cluster asks for no token: whoever reaches its ports runs code on its nodes (RAY_AUTH_MODE=token)"
        )
    return lines


def why(error: BaseException) -> str:
    """What Ray says of a failed task: the last line of the exception there."""
    if isinstance(error, TimeoutError):
        return "it does not answer"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]) if lines else type(error).__name__


def n_fitting(free: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many bundles fit into these resources."""
    return min((int(free.get(name, 0.0) // amount) for name, amount in bundle.items() if amount), default=0)


def in_words(bundle: Mapping[str, float]) -> str:
    """E.g. `1 CPU and 2 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items() if amount)


def free_words(nodes: Sequence[Node], bundle: Mapping[str, float]) -> str:
    """What is free where, of what a bundle names."""
    told = [
        f"{node.address} has "
        + ", ".join(f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name}" for name in bundle)
        + " free"
        for node in nodes
    ]
    return "; ".join(told) if told else "there are no nodes"
