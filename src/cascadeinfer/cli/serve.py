"""
`cascadeinfer serve MODEL --instances N [--stages ...] [any vLLM engine or server flag]`.

The parser is vLLM's own with our options added, so every vLLM flag works and `--help` lists both.
"""

import os
from argparse import Namespace
from typing import NoReturn

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.frontend.stop_signals import StopSignals


def serve(argv: list[str]) -> None:
    """
    Run the server until it is told to stop.

    Args:
        argv: The command line after `serve`.

    Raises:
        ConfigError: An option is invalid; nothing is left running.
    """
    with StopSignals() as signals:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # fork is unsafe once threads run
        args = parse(argv)

        import uvloop

        from cascadeinfer.assemble import run_server
        from cascadeinfer.config.schema import options_of

        uvloop.run(signals.until_stopped(run_server(args, options_of(args), signals)))


def parse(argv: list[str]) -> Namespace:
    """Parse vLLM's options and ours; fill in the model."""
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.exceptions import VLLMClientError
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cascadeinfer.cli.model_argument import EMBEDDED_NAME, model_of
    from cascadeinfer.cli.vllm_options import make_arg_parser, validate_parsed_serve_args
    from cascadeinfer.config.schema import add_arguments
    from cascadeinfer.engines.vllm.logs import log_as_vllm_does
    from cascadeinfer.frontend.server import import_parser_plugins

    parser = FlexibleArgumentParser(
        prog="cascadeinfer serve",
        description="Serve one model on several vLLM instances, with length stages and live migration.",
    )
    parser.error = _refuse  # instead of hundreds of lines of usage before the message
    make_arg_parser(parser)
    add_arguments(parser)
    args: Namespace = parser.parse_args(argv)
    args.model, named = model_of(args, argv, "serving")
    if not named:
        args.served_model_name = args.served_model_name or [EMBEDDED_NAME]
    try:
        validate_parsed_serve_args(args)
        import_parser_plugins(args)
        validate_api_server_args(args)
    except (KeyError, TypeError, ValueError, VLLMClientError) as error:
        raise ConfigError(str(error.args[0]).removeprefix("Error: ")) from error
    configure_logging_from_args(args)
    log_as_vllm_does()
    return args


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message, fix="cascadeinfer serve --help lists the options")
