"""The settings of a simulated cluster: plain values, checked once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.parking import ParkingLimits
from cascadeinfer.core.types import InstanceCapacity, InstanceId, NodeId
from cascadeinfer.sim.faults import FaultPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """
    Communication between instances.

    Attributes:
        link_bytes_per_s: KV cache transfer rate, per instance and direction; concurrent transfers share it equally.
        nodes: The node of each instance that is on a named one. Moves inside a node and between two are told apart.
        between_nodes_bytes_per_s: The rate between instances of different nodes.
        max_pulls: Concurrent transfers per instance and direction; further ones queue.
        pull_overhead_s: Set-up of each pull before its first byte.
        control_s: One-way time of a command or answer between front end and engine.
        message_delay_s: One-way time of a bid-ask message.
    """

    link_bytes_per_s: float = 50e9
    nodes: Mapping[InstanceId, NodeId] = field(default_factory=dict)
    between_nodes_bytes_per_s: float = 50e9
    max_pulls: int = 3
    pull_overhead_s: float = 0.005
    control_s: float = 0.0005
    message_delay_s: float = 0.0005

    def rate_of(self, source_id: InstanceId, target_id: InstanceId) -> float:
        """The link's rate from one instance to another, in bytes per second."""
        same_node = self.nodes.get(source_id) == self.nodes.get(target_id)
        return self.link_bytes_per_s if same_node else self.between_nodes_bytes_per_s


@dataclass(frozen=True, slots=True)
class SimKind:
    """
    A kind of simulated instances.

    Attributes:
        kind: The kind as the policy knows it.
        step_model: The actual step times. The policy is not told; it may have been given the same model under the
            kind's key.
    """

    kind: InstanceKind
    step_model: StepModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """
    A simulated cluster.

    Attributes:
        instances: Number of instances; their ids are `instance_ids(instances)`.
        capacity: Capacity of each instance that `kinds` does not name.
        step_model: Step times of each instance that `kinds` does not name; its key is the default one.
        kinds: Instances of other kinds, by id. KV cache can be transferred between any two instances.
        kv_bytes_per_token: KV cache bytes per token, for transfers.
        context_tokens: The model's longest sequence; no request may be longer. At least one instance can hold one.
        max_output_tokens: The cap that each request states; None states all the context left.
        network: Transfers and messages.
        migration: Limits of migrations, the same as the runtime's.
        parking: Limits of requests that are parked with their first token.
        report_interval_s: Between two reports of one instance; instances take turns.
        prefix_caching: Whether prompts share blocks by the trace's prefix hashes.
        detect_s: From a crash to its `InstanceLost`.
        faults: What goes wrong, and when.
        seed: For message loss and delay.
        stop_s: Stop at this time with whatever is unfinished; None runs until everything is over.
        stall_limit_s: Fail if nothing at all happens for this long while requests wait for the policy.
        fast_forward: Run stretches of decode steps in compiled code; off only to check that results do not change.
    """

    instances: int
    capacity: InstanceCapacity
    step_model: StepModel
    kv_bytes_per_token: float
    kinds: Mapping[InstanceId, SimKind] = field(default_factory=dict)
    context_tokens: int = 131_072
    max_output_tokens: int | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    migration: MigrationLimits = field(default_factory=MigrationLimits)
    parking: ParkingLimits = field(default_factory=ParkingLimits)
    report_interval_s: float = 0.1
    prefix_caching: bool = False
    detect_s: float = 0.5
    faults: FaultPlan = field(default_factory=FaultPlan)
    seed: int = 0
    stop_s: float | None = None
    stall_limit_s: float = 600.0
    fast_forward: bool = True

    def __post_init__(self) -> None:
        """
        Check what can be checked without a trace.

        Raises:
            ConfigError: A number is out of range, `kinds` names an instance that is not there, or one request of full
                length fits none.
        """
        if self.instances < 1:
            raise ConfigError(f"a cluster needs at least one instance, not {self.instances}", option="--instances")
        for name, value in (
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("link_bytes_per_s", self.network.link_bytes_per_s),
            ("between_nodes_bytes_per_s", self.network.between_nodes_bytes_per_s),
            ("report_interval_s", self.report_interval_s),
        ):
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name} must be positive and finite, not {value}")
        self._check_kinds()

    def _check_kinds(self) -> None:
        ids = instance_ids(self.instances)
        if strangers := sorted(set(self.kinds) - set(ids)):
            raise ConfigError(
                f"there is no instance {', '.join(strangers)}: there are {', '.join(ids)}", option="kinds"
            )
        capacities = list(dict.fromkeys(self.kind_of(instance_id).kind.capacity for instance_id in ids))
        for capacity in capacities:
            if min(capacity.kv_blocks, capacity.block_size_tokens, capacity.max_num_seqs, self.network.max_pulls) < 1:
                raise ConfigError(f"every capacity must be at least 1: {capacity}, max_pulls {self.network.max_pulls}")
            if capacity.max_batched_tokens < capacity.max_num_seqs:
                raise ConfigError(
                    f"a step of {capacity.max_batched_tokens} tokens cannot decode {capacity.max_num_seqs} requests",
                    option="max_batched_tokens",
                    fix="at least max_num_seqs",
                )
        largest_tokens = max(capacity.kv_tokens for capacity in capacities)
        if self.context_tokens > largest_tokens:
            raise ConfigError(
                f"a sequence of {self.context_tokens} tokens does not fit the KV cache of {largest_tokens}",
                option="context_tokens",
                fix=f"at most {largest_tokens}, and cap the trace to it",
            )

    def kind_of(self, instance_id: InstanceId) -> SimKind:
        """What this instance is."""
        return self.kinds.get(instance_id, SimKind(InstanceKind(self.capacity), self.step_model))

    def longest_tokens(self, prompt_tokens: int) -> int:
        """Sequence length that a request with this prompt may reach: its cap or the context."""
        left_tokens = self.context_tokens - prompt_tokens
        return prompt_tokens + (
            left_tokens if self.max_output_tokens is None else min(left_tokens, self.max_output_tokens)
        )


def instance_ids(n: int) -> tuple[InstanceId, ...]:
    """Names of `n` simulated instances; sorting them as text is sorting by number."""
    width = len(str(n - 1))
    return tuple(f"i{number:0{width}d}" for number in range(n))
