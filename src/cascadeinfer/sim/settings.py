"""What a simulated cluster is made of: plain values, checked once."""

import math
from dataclasses import dataclass, field

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.sim.faults import FaultPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """
    How instances talk.

    Attributes:
        link_bytes_per_s: KV cache transfer, per instance and direction; concurrent transfers share it equally.
        max_pulls: Transfers at once per instance and direction; more wait in line.
        pull_overhead_s: Set-up of each pull before its first byte.
        control_s: One way of a command or answer between front end and engine.
        message_delay_s: One way of a bid-ask message.
    """

    link_bytes_per_s: float = 50e9
    max_pulls: int = 3
    pull_overhead_s: float = 0.005
    control_s: float = 0.0005
    message_delay_s: float = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """
    A simulated cluster.

    Attributes:
        instances: How many; their ids are `instance_ids(instances)`.
        capacity: Of each.
        step_model: Step time of each.
        kv_bytes_per_token: Of KV cache, for transfers.
        context_tokens: The model's longest sequence; no request may be longer.
        max_output_tokens: The cap that each request states; None states all the context left.
        network: Transfers and messages.
        migration: Limits of migrations, the same as the runtime's.
        report_interval_s: Between two reports of one instance; instances take turns.
        prefix_caching: Whether prompts share blocks by the trace's prefix hashes.
        detect_s: From a crash to its `InstanceLost`.
        faults: What goes wrong, and when.
        seed: For message loss and delay.
        stop_s: Stop here, however much is unfinished; None runs until everything is over.
        stall_limit_s: Error when nothing at all has happened for so long while requests wait for the policy.
        fast_forward: Run stretches of decode steps in compiled code; off only to check that it makes no difference.
    """

    instances: int
    capacity: InstanceCapacity
    step_model: StepModel
    kv_bytes_per_token: float
    context_tokens: int = 131_072
    max_output_tokens: int | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    migration: MigrationLimits = field(default_factory=MigrationLimits)
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
            ConfigError: A number is out of range, or one request of full length does not fit an instance.
        """
        if self.instances < 1:
            raise ConfigError(f"a cluster needs at least one instance, not {self.instances}", option="--instances")
        for name, value in (
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("link_bytes_per_s", self.network.link_bytes_per_s),
            ("report_interval_s", self.report_interval_s),
        ):
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name} must be positive and finite, not {value}")
        capacity = self.capacity
        if min(capacity.kv_blocks, capacity.block_size_tokens, capacity.max_num_seqs, self.network.max_pulls) < 1:
            raise ConfigError(f"every capacity must be at least 1: {capacity}, max_pulls {self.network.max_pulls}")
        if capacity.max_batched_tokens < capacity.max_num_seqs:
            raise ConfigError(
                f"a step of {capacity.max_batched_tokens} tokens cannot decode {capacity.max_num_seqs} requests",
                option="max_batched_tokens",
                fix="at least max_num_seqs",
            )
        if self.context_tokens > capacity.kv_tokens:
            raise ConfigError(
                f"a sequence of {self.context_tokens} tokens does not fit the KV cache of {capacity.kv_tokens}",
                option="context_tokens",
                fix=f"at most {capacity.kv_tokens}, and cap the trace to it",
            )


def instance_ids(n: int) -> tuple[InstanceId, ...]:
    """Names of `n` simulated instances; sorting them as text is sorting by number."""
    width = len(str(n - 1))
    return tuple(f"i{number:0{width}d}" for number in range(n))
