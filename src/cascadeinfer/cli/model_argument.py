"""The model named on the command line, or else the embedded one, for commands that take vLLM's flags."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Final

from cascadeinfer.core.errors import ConfigError

EMBEDDED_NAME: Final = "smollm2-135m-instruct"


def model_of(args: Namespace, doing: str) -> tuple[str, bool]:
    """
    The model's folder or repository, and whether the operator named it.

    Args:
        args: The parsed command line; the default of `--model` is None.
        doing: The verb for the note on standard error about the embedded model, such as `serving`.

    Raises:
        ConfigError: The name looks like a path, and there is no model.
    """
    named = args.model_tag or args.model
    if named is None:
        from cascadeinfer.engines.models.embedded import prepare

        sys.stderr.write(f"no model given: {doing} the embedded SmolLM2-135M-Instruct\n")
        return str(prepare()), False
    looks_like_path = named.startswith((".", "/", "~"))
    if looks_like_path and not (Path(named).expanduser() / "config.json").is_file():
        raise ConfigError(
            f"{named} is not a model folder (it has no config.json)",
            option="MODEL",
            fix="name a Hugging Face folder or repository, or give none for the embedded model",
        )
    return (str(Path(named).expanduser()) if looks_like_path else named), True
