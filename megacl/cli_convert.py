"""`megacl convert`: a model from one format to another. tools/convert_checkpoint.py is a script of these functions."""

import re
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megacl.errors import ConfigError

Format = Literal["hf", "megacl"]
Readable = Literal["megacl", "hf", "gpt-neox", "megatron", "deepspeed", "litgpt"]
Architecture = Literal["gpt_neox", "llama", "mistral", "qwen2", "qwen3"]
Dtype = Literal["float32", "float16", "bfloat16"]

_SECONDS_BETWEEN_LINES = 10
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model: a run or checkpoint, or its files' folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[Format, typer.Option(help="The format to write: Hugging Face's, or a checkpoint of megacl's.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of hf: the numbers' type; by default as stored. megacl's is float32.")
    ] = None,
    architecture: Annotated[
        Architecture | None, typer.Option(help="Of hf: where several compute the same; by default the commonest.")
    ] = None,
    vocab_size: Annotated[
        str | None,
        typer.Option(help="Rows of the vocabulary to write, or `tokenizer`: without padding; by default as stored."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The size of a file of weights, such as 5GB.")] = "5GB",
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer, where it does not stand beside the weights.")
    ] = None,
    read_as: Annotated[
        Readable | None, typer.Option("--from", help="The format of SRC, where its files could be of several.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="What says what SRC is, where that does not stand beside the weights: gpt-neox's YAML, say."),
    ] = None,
) -> None:
    """Convert a model, with its tokenizer and its lineage. The same command goes on after an interruption.

    What the other format cannot express is refused before anything is written. What was written is read again and
    compared before it is published.
    """
    from megacl.convert.conversion import convert as convert_model
    from megacl.convert.opened import ReadOptions

    rows = _rows(vocab_size)
    try:
        with _Progress() as progress:
            report = convert_model(
                Path(source),
                destination,
                to=to,
                options=ReadOptions(
                    tokenizer=tokenizer, config=config, vocab_size=rows if isinstance(rows, int) else None
                ),
                from_format=read_as,
                architecture=architecture,
                dtype=dtype,
                vocab_size=rows,
                max_shard_size=size_in_bytes(max_shard_size),
                progress=progress.show,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is left", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    for line in report.lines():
        print(line)


def size_in_bytes(text: str) -> int:
    """The bytes of a size such as 5GB or 200MiB. ConfigError where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.upper())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"--max-shard-size is {text!r}; it must be a size such as 5GB or 200MiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _rows(text: str | None) -> "int | Literal['tokenizer'] | None":
    if text is None or text == "tokenizer":
        return text  # type: ignore[return-value]  # the one string that it may be
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--vocab-size is {text!r}; it must be a number of rows, or tokenizer.")
    return int(text)


class _Progress:
    """A bar on a terminal; elsewhere a line now and then, for a log."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=True, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._said = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes are done of one of the conversion's parts."""
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)
        if self._bar.disable and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"{what}: {done / 1e9:.3g} of {total / 1e9:.3g} GB", file=sys.stderr, flush=True)
