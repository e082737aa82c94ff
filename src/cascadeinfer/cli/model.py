"""
`cascadeinfer model`: model folders that need no hub.

Standard output is the folder's path and nothing else, for use in scripts; progress goes to standard error.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cascadeinfer.cli.extras import need
from cascadeinfer.core.errors import ConfigError


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command group."""
    group = typer.Typer(no_args_is_help=True)
    group.command("prepare")(prepare)
    group.command("tiny")(tiny)
    app.add_typer(group, name=name, help=help_text)


def prepare(
    *,
    force: Annotated[bool, typer.Option("--force", help="Convert again even if the folder exists.")] = False,
) -> None:
    """
    Convert the embedded model, SmolLM2-135M-Instruct, once and print its folder.

    It is kept in $CASCADEINFER_CACHE, by default ~/.cache/cascadeinfer.
    """
    from cascadeinfer.engines.models import embedded

    for package in ("gguf", "transformers"):  # the converter's, which runs in a process of its own
        need(package)
    with Console(stderr=True).status("Preparing the embedded model (SmolLM2-135M-Instruct), once per machine"):
        folder = embedded.prepare(force=force)
    typer.echo(folder)


def tiny(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    *,
    seed: Annotated[int, typer.Option(min=0, help="The weights are a function of it.")] = 0,
    max_positions: Annotated[int, typer.Option(min=1, help="Longest context, in tokens.")] = 8192,
) -> None:
    """Write a tiny random Llama with its tokenizer: it talks nonsense, but starts in seconds."""
    from cascadeinfer.engines.models.tiny import make_tiny_llama

    try:
        make_tiny_llama(folder, seed=seed, max_positions=max_positions)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror or error}", option="FOLDER", fix="name another folder"
        ) from error
    typer.echo(folder)
