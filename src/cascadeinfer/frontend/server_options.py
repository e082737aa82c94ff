"""
The options of vLLM's server (as opposed to its engines): who reads each, and which are refused.

`docs/vllm_options.md` is generated from these tables and those of `engines/vllm/refused_options.py`. A test enumerates
vLLM's parser and requires a place for every option, so that none is silently without effect.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Final

from vllm import envs

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.engines.vllm.refused_options import Refused

_GRPC: Final = Refused("serves gRPC in place of HTTP, without placement and migration", "use HTTP")
_SUPERVISOR: Final = Refused(
    "belongs to vLLM's supervisor of several servers", "remove it; /health/ready covers all instances"
)

REFUSED_SERVER_OPTIONS: Final[Mapping[str, Refused]] = {
    "headless": Refused("runs engines without a server, for a front end on another machine", "remove it"),
    "grpc": _GRPC,
    "grpc_port": _GRPC,
    **dict.fromkeys(
        (
            "data_parallel_supervisor_port",
            "dp_supervisor_probe_interval_s",
            "dp_supervisor_probe_timeout_s",
            "dp_supervisor_probe_failure_threshold",
        ),
        _SUPERVISOR,
    ),
}
"""By the name in the parsed arguments. All of them keep their defaults here."""

READ_HERE: Final = frozenset(
    {
        "api_key",
        "config",
        "disable_uvicorn_access_log",
        "enable_flash_late_interaction",
        "enable_ssl_refresh",
        "h11_max_header_count",
        "h11_max_incomplete_event_size",
        "host",
        "model_tag",
        "port",
        "ssl_ca_certs",
        "ssl_certfile",
        "ssl_cert_reqs",
        "ssl_ciphers",
        "ssl_keyfile",
        "tool_parser_plugin",
        "uds",
        "uvicorn_log_level",
    }
)
"""Options that vLLM's start of its server reads, which ours replaces. All others are read by its application."""

DIFFERENT_HERE: Final[Mapping[str, str]] = {
    "api_server_count": "refused above 1, and 0: use `--api-servers`",
    "config": "may also set the options of CascadeInfer",
    "host": "127.0.0.1 unless given; vLLM listens on all addresses",
    "api_key": "guards every route but probes and `/metrics`",
    "uds": "a socket file that a killed server left behind is replaced; the file is removed at the end",
    "enable_ssl_refresh": "refused without `--ssl-certfile` and `--ssl-keyfile`",
    "max_num_queued_reqs": "refused with more than one of `--api-servers`, each of which would count its own",
    "model": "without one, the embedded SmolLM2-135M-Instruct",
}
"""Options that work otherwise than vLLM documents them."""


def check_server_options(args: Namespace, defaults: Namespace, *, api_servers: int) -> None:
    """
    Reject what conflicts with our server or would have no effect, of the command line and of the environment.

    Args:
        args: The parsed command line.
        defaults: The same names with vLLM's defaults.
        api_servers: Our front-end processes.

    Raises:
        ConfigError: With the option and the fix.
    """
    for name, refused in REFUSED_SERVER_OPTIONS.items():
        refused.check("--" + name.replace("_", "-"), getattr(args, name), getattr(defaults, name))
    if args.api_server_count not in {None, 1}:
        raise ConfigError("is vLLM's own option", option="--api-server-count", fix="use --api-servers instead")
    if args.max_num_queued_reqs is not None and api_servers > 1:
        raise ConfigError(
            f"would be counted by each of the {api_servers} front-end processes alone",
            option="--max-num-queued-reqs",
            fix="use --max-queued-requests, which is divided among them",
        )
    check_environment(api_servers)


def check_environment(api_servers: int) -> None:
    """
    Reject variables of vLLM's that conflict with our server.

    Without vLLM's random part in request ids, a client that picks the id of another client's request would end that
    stream, in vLLM's own books and before we see it.

    Raises:
        ConfigError: With the variable and the fix.
    """
    if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
        raise ConfigError(
            "two requests must never have the same id, whatever clients call theirs",
            option="VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
            fix="unset it",
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ConfigError(
            "the front end in Rust does not place requests on several instances",
            option="VLLM_USE_RUST_FRONTEND",
            fix="unset it",
        )
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and api_servers > 1:
        raise ConfigError(
            "an adapter loaded at run time would be known to one of several front-end processes",
            option="VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            fix="use --lora-modules, or --api-servers 1",
        )
