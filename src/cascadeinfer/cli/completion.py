"""
Completion in the shell: `cascadeinfer --install-completion` writes typer's script, which runs this program at each Tab
key with the words so far in its environment.

Only the command that those words name is loaded, as when it runs. `serve` and `profile` have vLLM's parser, which takes
seconds to import; they complete our options and their choices, not vLLM's flags.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, Final

import typer

from cascadeinfer.config.options import flag_of

INSTRUCTION: Final = "_CASCADEINFER_COMPLETE"
"""Set by the shell's script, by typer's convention: `complete_bash`, `complete_zsh` ..."""
SCHEMAS: Final = {
    "serve": ("cascadeinfer.config.schema", "ServeOptions"),
    "profile": ("cascadeinfer.config.profile_schema", "ProfileOptions"),
}
"""Commands with a parser of their own, with the dataclass of our options."""


def typed_words(environ: Mapping[str, str]) -> list[str] | None:
    """The words after the program's name that wait for completion, or None if the shell asks for none."""
    if not environ.get(INSTRUCTION, "").startswith("complete_"):
        return None
    # bash passes COMP_WORDS, the other shells one variable of typer's.
    return environ.get("COMP_WORDS", environ.get("_TYPER_COMPLETE_ARGS", "")).split()[1:]


def stand_in(name: str) -> Callable[..., None]:
    """A function with the options of `serve` or `profile` as its parameters, for typer to read; it never runs."""
    module, schema = SCHEMAS[name]
    declared = fields(getattr(importlib.import_module(module), schema))

    def placeholder(**_options: object) -> None:
        raise AssertionError("only completed, never run")

    parameters = [_parameter(field) for field in declared]
    placeholder.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    placeholder.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return placeholder


def _parameter(field: Field[Any]) -> inspect.Parameter:
    choices = field.metadata.get("choices")
    shown = typer.Option(
        flag_of(field.name),
        help=field.metadata["text"],
        autocompletion=None if choices is None else lambda: list(choices),
    )
    flag = isinstance(field.default, bool)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if flag else None,
        annotation=Annotated[bool if flag else str | None, shown],
    )
