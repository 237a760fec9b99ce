"""The verbs of `megacl data`: look at prepared data and look after it. Each imports what it needs inside."""

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Look after prepared data.", no_args_is_help=True)


@data_app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A data folder.")]) -> None:
    """Compare every shard with its hash."""
    from megacl.data.verify import verify_source

    problems = verify_source(folder)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{folder}: every shard is as its manifest says")
