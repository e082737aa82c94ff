"""
vLLM's engine options that are refused here, each with its reason and what to do instead.

All other engine options are passed on to every instance. `frontend/server_options.py` has the options of vLLM's server;
`docs/vllm_options.md` is generated from both tables.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final

import pydantic
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Refused:
    """
    Why an option is refused, and what to do instead.

    Attributes:
        why: The predicate of a sentence whose subject is the option.
        fix: What to do instead.
        values: The values that are refused; empty: every value but the default.
    """

    why: str
    fix: str
    values: tuple[str, ...] = ()

    def check(self, flag: str, value: Any, default: Any) -> None:
        """Raise ConfigError if the value is one of those that are refused."""
        if value in self.values if self.values else value != default:
            raise ConfigError(self.why, option=flag, fix=self.fix)


_REMOVE: Final = "remove it"
_DATA_PARALLEL: Final = Refused("is a part of vLLM's own way to run several engines", "use --instances instead")
_SLEEP: Final = Refused("moves the KV cache to other memory without informing the peers that pull from it", _REMOVE)
_ONE_MACHINE: Final = Refused("spreads one engine over several machines; all instances run on this one", _REMOVE)
_ALL_ALIKE: Final = Refused(
    "would pin every instance to the same devices or cores",
    "use CUDA_VISIBLE_DEVICES; each instance gets its own share of it",
)
_OTHER_CONNECTOR: Final = Refused("brings its own KV connector, and an engine has room for one", _REMOVE)

REFUSED_ENGINE_OPTIONS: Final[Mapping[str, Refused]] = {
    **dict.fromkeys(
        (
            "data_parallel_size",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "dp_sync_interval",
            "disable_nccl_for_dp_synchronization",
            "enable_elastic_ep",
            "elastic_ep_max_dp_size",
        ),
        _DATA_PARALLEL,
    ),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), _ONE_MACHINE),
    **dict.fromkeys(("device_ids", "numa_bind_nodes", "numa_bind_cpus"), _ALL_ALIKE),
    **dict.fromkeys(("enable_sleep_mode", "sleep_mode_offload_cudagraph", "sleep_preserve_parameter_names"), _SLEEP),
    **dict.fromkeys(("kv_offloading_size", "kv_offloading_backend"), _OTHER_CONNECTOR),
    **dict.fromkeys(
        ("enable_fault_tolerance", "fault_tolerance_config"),
        Refused("is vLLM's recovery of data-parallel engines; instances that die are restarted anyway", _REMOVE),
    ),
    "distributed_executor_backend": Refused(
        "would choose devices by itself, against the place of each instance", "remove it", ("ray", "external_launcher")
    ),
    "prefill_context_parallel_size": Refused("does not go with a connector that receives KV caches", _REMOVE),
    "kv_transfer_config": Refused("is set by CascadeInfer for live migration", _REMOVE),
    "ec_transfer_config": Refused(
        "takes its transfers from the bodies of requests (`ec_transfer_params`), which are refused", _REMOVE
    ),
    "kv_events_config": Refused("would have all instances publish at the same address", _REMOVE),
    "enable_return_routed_experts": Refused("would lose the experts of all tokens before a migration", _REMOVE),
    "aggregate_engine_logging": Refused(
        "logs statistics for a fixed set of engines, and instances come and go", "remove it, and scrape /metrics"
    ),
    "shutdown_timeout": Refused("is the time for running requests of one engine", "use --drain-timeout-s instead"),
}
"""By the name of the argument. All of them keep their defaults here."""


def check_engine_args(engine_args: AsyncEngineArgs) -> None:
    """
    Refuse vLLM's options that contradict ours.

    Raises:
        ConfigError: With the option and the fix.
    """
    for name, refused in REFUSED_ENGINE_OPTIONS.items():
        refused.check("--" + name.replace("_", "-"), getattr(engine_args, name), engine_default(name))


def engine_default(name: str) -> Any:
    """The default of an engine argument."""
    [declared] = [field for field in fields(AsyncEngineArgs) if field.name == name]
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


@contextlib.contextmanager
def vllm_refusals() -> Iterator[None]:
    """What vLLM raises while it looks at its arguments is the operator's to mend."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"vLLM refuses the engine arguments: {what_is_wrong(error)}") from error


def what_is_wrong(error: BaseException, n_lines: int = 4) -> str:
    """The part of vLLM's (often long) message that says what is wrong."""
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(
            f"{'--' + str(fault['loc'][-1]).replace('_', '-') + ': ' if fault['loc'] else ''}{fault['msg']}"
            for fault in error.errors()
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:n_lines]) or type(error).__name__
