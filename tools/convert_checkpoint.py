"""Converts a model between formats, as `megacl convert` does, by the same functions.

python tools/convert_checkpoint.py SRC DST --to hf [--dtype bfloat16] [--vocab-size tokenizer] [--max-shard-size 5GB]

SRC is a run or checkpoint of megacl's, or a folder in a format that is known by its files (docs/conversion.md). DST
must not be there. The same command goes on after an interruption. Exit status: 0, or 2 and a line on standard error.
"""

import sys

import typer

from megacl.cli_convert import convert
from megacl.errors import MegaclError


def main() -> int:
    """Returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(convert)
    try:
        app()
    except MegaclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
