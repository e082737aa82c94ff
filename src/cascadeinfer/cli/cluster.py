"""`cascadeinfer cluster up` and `down`: a Ray cluster of one node on this machine, for trying `--cluster ray` out."""

from typing import Annotated

import typer

from cascadeinfer.cluster import ray_here


def register(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the command."""
    commands = typer.Typer(help=help_text, no_args_is_help=True)
    commands.command("up")(up)
    commands.command("down")(down)
    app.add_typer(commands, name=name)


def up(
    *,
    host: Annotated[
        str | None, typer.Option(help="This machine's address. Without it: the one by which others reach it.")
    ] = None,
    port: Annotated[int, typer.Option(help="Of the cluster's head.", min=1, max=65535)] = ray_here.DEFAULT_PORT,
    cpus: Annotated[int | None, typer.Option(help="CPUs for instances. Without it: the machine's.", min=1)] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs for instances. Without it: the machine's.", min=0)] = None,
) -> None:
    """Start Ray on this machine, with a token; `cascadeinfer serve MODEL --cluster ray` finds it."""
    head = ray_here.up(host or ray_here.own_address(), port, cpus, gpus)
    typer.echo(f"Ray runs at {head.address}; its token is in {ray_here.folder_of() / 'token'}")
    typer.echo("cascadeinfer serve MODEL --cluster ray      serves on it")
    typer.echo("cascadeinfer cluster down                   ends it, and all engines on it")


def down() -> None:
    """End the Ray that `cascadeinfer cluster up` has started, and all engines on it."""
    head = ray_here.down()
    typer.echo(f"Ray at {head.address} has ended")
