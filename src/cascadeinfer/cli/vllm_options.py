"""The options of vLLM's server, from the place where this version of vLLM keeps them."""

from argparse import ArgumentParser, Namespace
from typing import Final

import vllm

MOVED: Final = (0, 33)
"""The version in which the module went elsewhere."""

if tuple(vllm.__version_tuple__[:2]) >= MOVED:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
else:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

__all__ = ["defaults", "make_arg_parser", "validate_parsed_serve_args"]


def defaults(parser: ArgumentParser) -> Namespace:
    """The default of every option of a parser, by its name in the parsed arguments."""
    return Namespace(**{action.dest: action.default for action in parser._actions})  # noqa: SLF001 - argparse has no other list
