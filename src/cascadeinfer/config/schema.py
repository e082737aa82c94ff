"""
The options of `cascadeinfer serve` beyond vLLM's own, each defined once with its bounds and documentation.

The command line, the help text and `docs/cli.md` are generated from `ServeOptions`. All values are checked here, before
anything starts.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Final

from cascadeinfer.config.instance_args import OPTION as INSTANCE_ARGS
from cascadeinfer.config.instance_args import read_instance_args
from cascadeinfer.config.options import add_options, check_bounds, options_from
from cascadeinfer.config.options import option as _option
from cascadeinfer.config.ray_resources import custom_resources
from cascadeinfer.config.stages import WantedStage, check_plain, layout_of, read_stages, terms_of, without_file
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.kind import InstanceTerms
from cascadeinfer.core.layout import RoleLayout, StageLayout
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.types import InstanceId

DEFAULT_POLICY: Final = "cascade"
"""The policy if the options name none and give no stages."""
DEFAULT_POLICY_WITH_STAGES: Final = "static_stages"
"""The policy if the options name none but give stages, which then stay fixed."""
DEFAULT_POLICY_WITH_ROLES: Final = "roles"
"""The same, if a stage has a role or a chunk budget."""
DEFAULT_FLEET: Final = "default"
"""The name of a fleet on a Ray cluster if the options give none."""
_POLICIES_IN_WORDS: Final = "; ".join(f"{name} ({info.help})" for name, info in sorted(POLICIES.items()))
_WITH_QUEUE: Final = f"policy {' or '.join(name for name, info in POLICIES.items() if info.has_queue)}"

_PLANNING: Final = f"policy {' or '.join(name for name, info in POLICIES.items() if info.uses_profile)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of `serve`."""

    instances: int = _option(2, "Instances of the model, each its own engine process.", low=1, high=1024)
    stages: str | None = _option(
        None,
        "Length stages as RANGE:INSTANCES, e.g. `0-512:1,512-:1`, with roles and chunk budgets as in "
        "`prefill@512-:1,0-4096/1024:2,4096-:1`, or a file: TOML, or the JSON of `plan --roles`. Without it: one "
        "stage.",
        metavar="STAGES",
    )
    instance_args: str | None = _option(
        None,
        "Engine options of single instances, which come on top of those for all: `0: --max-num-seqs 8; 1-3: "
        "--max-num-seqs 64`. Instances are dealt to --stages in the order of their numbers.",
        metavar="ARGS",
    )
    cluster: str = _option(
        "local",
        "Where the instances are: local (this server starts them on this machine), ray (on the nodes of a Ray cluster, "
        "as a fleet), or static (engines that others have started, named with --engines).",
        choices=("local", "ray", "static"),
    )
    engines: str | None = _option(
        None,
        "With --cluster static: where the engines listen, as HOST:PORT,HOST:PORT. A name may stand for many addresses; "
        "it is looked up again and again.",
        metavar="ADDRESSES",
    )
    cluster_key: str | None = _option(
        None, "With --cluster static: the file with the key that front ends and engines share.", metavar="FILE"
    )
    cluster_host: str | None = _option(
        None,
        "With --cluster static or ray: the address of this machine to which engines connect. Without it: the one by "
        "which they are reached.",
        metavar="ADDRESS",
    )
    ray_address: str | None = _option(
        None,
        "With --cluster ray: HOST:PORT of the cluster's head. Without it: RAY_ADDRESS, else the cluster that "
        "`cascadeinfer cluster up` has started, else the one that this machine is a node of.",
        metavar="ADDRESS",
    )
    ray_cpus: int = _option(
        1,
        "With --cluster ray: CPUs of an instance, as Ray counts them; on nodes without GPUs, its cores.",
        low=1,
        high=1024,
    )
    ray_gpus: int = _option(
        -1,
        "With --cluster ray: GPUs of an instance, all on one node. -1: one for each worker if the cluster has any.",
        low=-1,
        high=64,
    )
    ray_resources: str | None = _option(
        None,
        "With --cluster ray: Ray's custom resources that an instance takes besides, as NAME=AMOUNT,NAME=AMOUNT.",
        metavar="RESOURCES",
    )
    fleet: str | None = _option(
        None,
        "Give the engines this name together. They then outlive the server: the next one with the same name and the "
        "same engine options adopts them, and `cascadeinfer stop NAME` ends them. With --cluster ray it is `default` "
        "unless you say another.",
        metavar="NAME",
    )
    orphan_timeout_s: float = _option(
        600.0,
        "With --fleet: seconds after which engines end that no server uses any more; 0: never.",
        low=0.0,
        high=604800.0,
    )
    standby: bool = _option(
        False, "With --fleet: while another server uses the fleet, wait, and take over as soon as that one is gone."
    )
    policy: str | None = _option(
        None,
        f"Scheduling policy: {_POLICIES_IN_WORDS}. Default: {DEFAULT_POLICY_WITH_STAGES} when --stages is given, "
        f"else {DEFAULT_POLICY}.",
        choices=tuple(sorted(POLICIES)),
    )
    profile: str | None = _option(
        None,
        "Initial cost profile: a shipped name or a file. Without one, the server learns step costs from scratch.",
        metavar="PROFILE",
    )
    accept_poor_profile: bool = _option(
        False, "Take a --profile whose own measurement says that it is not fit for use."
    )
    max_queued_requests: int = _option(
        1024,
        f"Requests that may wait for room in front of the instances ({_WITH_QUEUE}); more get HTTP 429.",
        low=1,
        high=1_000_000,
    )
    ttft_slo_s: float = _option(
        0.0,
        f"Limit on the time to first token, to publish how many instances would keep it ({_PLANNING}); with "
        "--tpot-slo-s. 0: none.",
        low=0.0,
        high=3600.0,
    )
    tpot_slo_s: float = _option(0.0, "Limit on the time per output token, as --ttft-slo-s.", low=0.0, high=3600.0)
    slo_attainment: float = _option(0.95, "Share of requests that are to keep both limits.", low=0.01, high=0.999)
    api_servers: int = _option(
        1,
        "Front-end processes over the same instances; a process serves some thousand tokens per second.",
        low=1,
        high=64,
    )
    report_interval_s: float = _option(
        0.1, "Seconds between load reports of an instance that has requests.", low=0.01, high=5.0
    )
    idle_report_interval_s: float = _option(
        1.0,
        "Seconds between load reports of an instance that has had none for a while; it is asked at once when it is "
        "given one.",
        low=0.01,
        high=60.0,
    )
    suspect_after_s: float = _option(
        1.0,
        "An instance whose load report is overdue by this much gets nothing new while another answers.",
        low=0.1,
        high=3600.0,
    )
    hang_timeout_s: float = _option(
        60.0, "An instance silent for this long is killed and restarted; above its longest step.", low=1.0, high=3600.0
    )
    poison_deaths: int = _option(
        2, "Deaths of instances under one request after which it is ended with HTTP 500.", low=2, high=1_000_000
    )
    drain_timeout_s: float = _option(
        600.0,
        "Seconds that running requests may take to finish after SIGTERM, or to leave an instance that is drained.",
        low=0.0,
        high=86400.0,
    )
    kv_lease_s: int = _option(
        10, "Seconds that a moving request's KV cache stays pinned at its source.", low=5, high=300
    )
    admin_api_key: str | None = _option(
        None,
        "Key for /admin and everything else that changes the service; without it, the API key is used. Better set in "
        "the environment (CASCADEINFER_ADMIN_API_KEY), where `ps` does not show it.",
        metavar="KEY",
    )
    max_request_body_mb: int = _option(
        32, "Largest body of a request in MiB; larger ones get HTTP 413.", low=1, high=4096
    )
    max_connections: int = _option(
        8192,
        "Concurrent connections to a front-end process; beyond them only probes and /metrics are answered.",
        low=1,
        high=1_000_000,
    )
    header_timeout_s: float = _option(
        10.0, "Seconds within which the headers of a request must arrive.", low=0.1, high=3600.0
    )
    body_timeout_s: float = _option(
        120.0, "Seconds within which the body of a request must arrive.", low=0.1, high=86400.0
    )
    send_timeout_s: float = _option(
        120.0,
        "Seconds after which a client that does not read its response is disconnected.",
        low=0.1,
        high=86400.0,
    )
    placement_headers: bool = _option(
        False, "Say in response headers where a request ran: x-cascade-instance, x-cascade-moves, x-request-id."
    )
    client_kv_transfer_params: str = _option(
        "refuse",
        "What to do with a client's `kv_transfer_params`: refuse the request (HTTP 400), or serve it without them. "
        "They are never obeyed.",
        choices=("refuse", "ignore"),
    )
    structured_max_kb: int = _option(
        512, "Largest JSON schema, grammar or list of choices of a structured output, in KiB.", low=1, high=32768
    )
    structured_max_depth: int = _option(
        32, "Maximum depth of nested schemas in a JSON schema, references counted.", low=1, high=100
    )
    structured_max_parts: int = _option(
        10_000, "Maximum number of schemas in a JSON schema, references followed.", low=1, high=10_000_000
    )
    structured_max_alternatives: int = _option(
        5000,
        "Maximum number of enum values, branches and choices of a structured output together.",
        low=1,
        high=10_000_000,
    )
    structured_max_regex: int = _option(
        4096, "Longest regular expression of a structured output, in characters.", low=1, high=1_000_000
    )
    structured_max_lengths: int = _option(
        32,
        "Maximum number of different length bounds in a structured output: "
        "minLength with maxLength, counted repetitions.",
        low=0,
        high=1_000_000,
    )
    verbose: bool = _option(
        False, "Show vLLM's own log lines, too (as --log-level INFO does); without it, only its errors.", short="-v"
    )
    log_format: str = _option("text", "Form of log lines; `json` has one object per line.", choices=("text", "json"))
    event_log: str | None = _option(
        None,
        "Write every event and the decisions made to this file, for `cascadeinfer replay`; ids and lengths only.",
        metavar="PATH",
    )
    event_log_mb: int = _option(
        256, "Size in MB at which a file of the event log is compressed and a new one begun.", low=1, high=65536
    )
    event_log_files: int = _option(8, "Files of the event log that are kept; the oldest is deleted.", low=2, high=1000)

    def __post_init__(self) -> None:
        """Check every bound; raises ConfigError that names the option."""
        check_bounds(self)
        if self.cluster == "static":
            self._check_static()
        else:
            for option, value in (("--engines", self.engines), ("--cluster-key", self.cluster_key)):
                if value is not None:
                    raise ConfigError("is for --cluster static", option=option, fix="add --cluster static")
        if self.cluster == "ray":
            custom_resources(self.ray_resources)
        else:
            for option, value in (("--ray-address", self.ray_address), ("--ray-resources", self.ray_resources)):
                if value is not None:
                    raise ConfigError("is for --cluster ray", option=option, fix="add --cluster ray")
        self._check_fleet()
        self.own_args()

    def own_args(self) -> dict[InstanceId, tuple[str, ...]]:
        """The engine options of instances that have their own, as words of a command line. Raises ConfigError."""
        if self.instance_args is None:
            return {}
        if self.cluster != "local" or self.fleet_name is not None:
            raise ConfigError(
                "is for instances that end with this server",
                option=INSTANCE_ARGS,
                fix="the engines of a fleet have the same options; those that others start have what they were given",
            )
        return read_instance_args(self.instance_args, self.instance_ids)

    def _check_fleet(self) -> None:
        if self.fleet_name is None:
            if self.standby:
                raise ConfigError("waits for a fleet", option="--standby", fix="add --fleet NAME")
            return
        if self.cluster == "static":
            raise ConfigError(
                "names engines that a server starts",
                option="--fleet",
                fix="with --cluster static they outlive it anyway",
            )

    def _check_static(self) -> None:
        for option, value, fix in (
            ("--engines", self.engines, "name the engines, as HOST:PORT,HOST:PORT"),
            ("--cluster-key", self.cluster_key, "name the file with the key that the engines have"),
        ):
            if not value:
                raise ConfigError("is missing with --cluster static", option=option, fix=fix)
        if self.api_servers > 1:
            raise ConfigError(
                "is 1 with --cluster static", option="--api-servers", fix="start further servers on the same engines"
            )

    @property
    def fleet_name(self) -> str | None:
        """The name of the engines together; None: they end with the server."""
        return self.fleet or (DEFAULT_FLEET if self.cluster == "ray" else None)

    @property
    def instance_ids(self) -> tuple[InstanceId, ...]:
        """Instance ids: consecutive numbers, which vLLM's metrics carry as the label `engine`."""
        return tuple(str(i) for i in range(self.instances))

    def layout(self) -> StageLayout:
        """
        The stages over the instances; one stage without `--stages`.

        Raises:
            ConfigError: The stages overlap, leave a gap, or do not add up to `--instances`, or one of them has a role
                or a chunk budget.
        """
        wanted = self._wanted_stages()
        if wanted is None:
            return StageLayout.single(self.instance_ids)
        check_plain(wanted, self.policy_name())
        return layout_of(wanted, self.instance_ids).stages

    def roles(self) -> RoleLayout | None:
        """
        The stages with their roles over the instances; None without `--stages`.

        Raises:
            ConfigError: The ranges of stages of one role overlap or leave a gap, or they do not add up to
                `--instances`.
        """
        wanted = self._wanted_stages()
        return None if wanted is None else layout_of(wanted, self.instance_ids)

    def terms(self) -> dict[InstanceId, InstanceTerms]:
        """The roles and chunk budgets of the instances; none without `--stages`. Raises ConfigError, as `roles`."""
        wanted = self._wanted_stages()
        return {} if wanted is None else terms_of(wanted, self.instance_ids)

    def n_staged(self) -> int:
        """How many instances `--stages` asks for. Raises ConfigError if it is malformed."""
        return sum(stage.n_instances for stage in self._wanted_stages() or [])

    def _wanted_stages(self) -> list[WantedStage] | None:
        return None if self.stages is None else read_stages(self.stages)

    def policy_name(self) -> str:
        """The policy asked for, or the default. Raises ConfigError if `--stages` is malformed."""
        if self.policy is not None:
            return self.policy
        wanted = self._wanted_stages()
        if wanted is None:
            return DEFAULT_POLICY
        return DEFAULT_POLICY_WITH_STAGES if all(stage.is_plain for stage in wanted) else DEFAULT_POLICY_WITH_ROLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser, as a separate group."""
    add_options(parser, ServeOptions)


def options_of(namespace: argparse.Namespace) -> ServeOptions:
    """The checked options from a parsed command line, with the stages of a file in its place."""
    options = options_from(namespace, ServeOptions)
    return options if options.stages is None else replace(options, stages=without_file(options.stages))
