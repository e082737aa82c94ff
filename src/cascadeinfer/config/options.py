"""
Declaration of options: each is one field of a dataclass, with bounds and a sentence of documentation.

The command line, the help text, the bounds and `docs/cli.md` all follow from the field. `add_options` adds flags to a
command with its own parser (`serve` and `profile`, which also take vLLM's flags).
"""

import argparse
from dataclasses import MISSING, Field, field, fields
from typing import Any, ClassVar, Protocol, TypeVar

from cascadeinfer.core.errors import ConfigError


class Options(Protocol):
    """A dataclass whose fields were made by `option`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Schema = TypeVar("Schema", bound=Options)


def option(default: Any, text: str, *, low: float | None = None, high: float | None = None, **extra: Any) -> Any:
    """A field with documentation and inclusive bounds; `choices` and `metavar` as in argparse, `short` as in `-v`."""
    return field(default=default, metadata={"text": text, "low": low, "high": high, **extra})


def flag_of(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def check_bounds(options: Options) -> None:
    """
    Check every bound.

    Raises:
        ConfigError: A value is out of bounds; the message names the option.
    """
    for declared in fields(options):
        value, low, high = getattr(options, declared.name), declared.metadata["low"], declared.metadata["high"]
        if value is None or low is None:
            continue
        if not low <= value <= high:
            raise ConfigError(f"{value} is not between {low} and {high}", option=flag_of(declared.name))


def add_options(parser: argparse.ArgumentParser, schema: type[Options]) -> None:
    """Add the options to a parser, as a separate group."""
    group = parser.add_argument_group("CascadeInfer")
    for declared in fields(schema):
        short = [declared.metadata["short"]] if "short" in declared.metadata else []
        group.add_argument(*short, flag_of(declared.name), **_keywords(declared))


def options_from(namespace: argparse.Namespace, schema: type[Schema]) -> Schema:
    """The checked options from a parsed command line."""
    return schema(**{declared.name: getattr(namespace, declared.name) for declared in fields(schema)})


def _keywords(declared: Field[Any]) -> dict[str, Any]:
    assert declared.default is not MISSING
    keywords: dict[str, Any] = {"default": declared.default, "help": declared.metadata["text"], "dest": declared.name}
    if "choices" in declared.metadata:
        return keywords | {"choices": declared.metadata["choices"]}
    if isinstance(declared.default, bool):
        return keywords | {"action": "store_true"}
    return keywords | {"type": type(declared.default) if declared.default is not None else str}
