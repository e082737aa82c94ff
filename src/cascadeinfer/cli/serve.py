"""
`cascadeinfer serve MODEL --instances N [--stages ...] [any vLLM engine or server flag]`.

The parser is vLLM's own with our options added, so every vLLM flag works and `--help` lists both.
"""

import atexit
import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, NoReturn

from cascadeinfer.cli.main import EXIT_FAILURE, complain
from cascadeinfer.core.errors import ConfigError, EngineError
from cascadeinfer.frontend.stop_signals import StopSignals

if TYPE_CHECKING:  # seconds of imports
    from vllm.utils.argparse_utils import FlexibleArgumentParser


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

        try:
            uvloop.run(signals.until_stopped(run_server(args, options_of(args), signals)))
        except EngineError as error:
            complain(error)
            _leave(EXIT_FAILURE)
        _leave(0)


def _leave(code: int) -> NoReturn:
    """
    End the process after Python's exit handlers, without its finalisation.

    That would list what the bindings of Triton leak, over some 30 lines, below the line that says how it ended.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - nothing else runs them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(argv: list[str]) -> Namespace:
    """Parse vLLM's options and ours; fill in the model; set logging up."""
    is_level_said = "VLLM_LOGGING_LEVEL" in os.environ
    if not is_level_said:  # read by vLLM's modules when they are imported, here and in the instances' processes
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO" if {"-v", "--verbose"} & set(argv) else "ERROR"

    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.exceptions import VLLMClientError

    from cascadeinfer.cli.config_file import words_with_config
    from cascadeinfer.cli.model_argument import EMBEDDED_NAME, model_of
    from cascadeinfer.cli.vllm_options import defaults, validate_parsed_serve_args
    from cascadeinfer.frontend.listening import check_tls
    from cascadeinfer.frontend.logs import choose_levels, set_up_logs
    from cascadeinfer.frontend.server import import_parser_plugins
    from cascadeinfer.frontend.server_options import check_server_options

    parser = make_parser()
    args: Namespace = parser.parse_args(words_with_config(argv))
    if args.config is not None:  # an abbreviation, which vLLM does not take for the option
        raise ConfigError("must be written out", option="--config")
    check_server_options(args, defaults(parser), api_servers=args.api_servers)
    check_tls(args)
    args.model, named = model_of(args, "serving")
    if not named:
        args.served_model_name = args.served_model_name or [EMBEDDED_NAME]
    try:
        validate_parsed_serve_args(args)
        import_parser_plugins(args)
        validate_api_server_args(args)
    except (KeyError, TypeError, ValueError, VLLMClientError) as error:
        raise ConfigError(str(error.args[0]).removeprefix("Error: ")) from error
    choose_levels(args, is_said=is_level_said, verbose=args.verbose)
    set_up_logs(args, form=args.log_format)
    return args


def make_parser() -> "FlexibleArgumentParser":
    """The parser of vLLM's options and ours; without a model on the command line, `model` is None."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cascadeinfer.cli.vllm_options import make_arg_parser
    from cascadeinfer.config.schema import add_arguments

    parser = FlexibleArgumentParser(
        prog="cascadeinfer serve",
        description="Serve one model on several vLLM instances, with length stages and live migration.",
    )
    parser.error = _refuse  # instead of hundreds of lines of usage before the message
    make_arg_parser(parser)
    add_arguments(parser)
    parser.set_defaults(model=None)
    return parser


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message, fix="cascadeinfer serve --help lists the options")
