"""Converting a model: `megacl convert SRC DST --to FORMAT`.

    report = convert("runs/mine", Path("mine-hf"), to="hf")

The source is opened and everything that the target cannot express is refused, before anything is written. Tensors go
through memory one at a time. What is written is read again, as a model of its format, and compared tensor by tensor;
then it is renamed to its place, with the lineage, in which the conversion is an entry of its own.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megacl.convert.detect import open_model
from megacl.convert.hf_config import Architecture
from megacl.convert.hf_writing import plan_hf
from megacl.convert.opened import OpenedModel, ReadOptions, refitted
from megacl.convert.own import plan_own
from megacl.convert.plan import bytes_of
from megacl.convert.staging import Staging, check_free
from megacl.errors import ConversionError
from megacl.lineage import ConversionRecord, Lineage
from megacl.publish import disk_errors, sha256_of

Format = Literal["hf", "megacl"]
"""The formats that are written."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of a file of tensors."""

Progress = Callable[[str, int, int], None]
"""Told what is done ("writing", "checking"), and how many bytes of how many."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion came to."""

    source: OpenedModel
    """As it was written: with its notes."""
    destination: Path
    files: int
    """Files of tensors."""
    tensor_bytes: int

    def lines(self) -> Iterator[str]:
        """The report as text."""
        plural = "" if self.files == 1 else "s"
        size = f"{self.tensor_bytes / 1e9:.1f} GB" if self.tensor_bytes >= 1e9 else f"{self.tensor_bytes / 1e6:.1f} MB"
        yield f"{self.destination}: {size} in {self.files} file{plural}, read again and equal"
        yield from (f"note: {note}" for note in self.source.notes)


def convert(
    source: Path,
    destination: Path,
    *,
    to: Format,
    options: ReadOptions | None = None,
    from_format: str | None = None,
    architecture: Architecture | None = None,
    dtype: str | None = None,
    vocab_size: int | Literal["tokenizer"] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = lambda what, done, total: None,
) -> ConvertReport:
    """Converts a model. The same call goes on after an interruption.

    from_format: where the files could be of several. architecture: of hf. dtype: of hf, one of DTYPES;
    by default as stored; megacl's is float32. vocab_size: the rows of the vocabulary that are written; "tokenizer": as
    many as there are tokens; by default as many as were read. max_shard_size: bytes of a file of tensors.

    Raises ConversionError where the source cannot be read or not be expressed, or the destination is there; DataError
    where the disk refuses, or the tokenizer cannot be read.
    """
    check_free(destination)
    if to == "megacl" and (architecture or dtype not in (None, "float32")):
        raise ConversionError("a checkpoint of megacl's has one architecture and is in float32; leave the option out.")
    found = open_model(source, options, format=from_format)
    rows = _rows(found, vocab_size)
    wanted = torch.float32 if to == "megacl" else DTYPES[dtype] if dtype else None
    model = refitted(found, vocab_size=rows, dtype=wanted)
    plan = (
        plan_own(model, destination, max_shard_size=max_shard_size)
        if to == "megacl"
        else plan_hf(model, architecture=architecture, max_shard_size=max_shard_size)
    )
    model = replace(model, notes=(*model.notes, *plan.notes))
    total = sum(map(bytes_of, plan.files.values()))
    identity = {
        "source": str(model.path.resolve()),
        "sources": [_state_of(file) for file in model.sources],
        "files": {
            name: {key: [str(dtype), *shape] for key, (dtype, shape) in each.items()}
            for name, each in plan.files.items()
        },
        "to": to,
    }
    with Staging(destination, identity) as staging, ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(lambda: {} if model.checkpoint else model.files)  # a checkpoint's are in its mark
        written = staging.write(plan, _count("writing", total, progress))
        files = hashes.result()
        if model.checkpoint and to == "hf":
            files = {name: each.digest for name, each in written.items()}
        elif model.checkpoint:
            files = {name: sha256_of(staging.files / name) for name in written}
        with disk_errors(staging.files, "the converted model"):
            folder = plan.finish(staging.files, written, converted(model, to, files))
        plan.check(folder, _count("checking", total, progress))
        staging.publish(folder)
    return ConvertReport(model, destination, len(plan.files), total)


def _state_of(file: Path) -> tuple[str, int, int]:
    """By which a file of the source is known again. ConversionError where it is not there."""
    try:
        state = file.stat()
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}. Copy it again.") from None
    return str(file), state.st_size, state.st_mtime_ns


def _rows(model: OpenedModel, vocab_size: int | Literal["tokenizer"] | None) -> int | None:
    if vocab_size != "tokenizer":
        return vocab_size
    if model.tokenizer_vocab_size is None:
        raise ConversionError(f"{model.path}: there is no tokenizer that says how many tokens there are; name it.")
    return model.tokenizer_vocab_size


def _count(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(what, done, total)

    return count


def converted(model: OpenedModel, to: str, files: dict[str, str]) -> Lineage:
    """The model's history with this conversion behind it."""
    before = model.lineage or Lineage()
    notes = list(model.notes)
    last = before.events[-1] if before.events else None
    # Out of a checkpoint, the files of the entry are those that were written; of other entries, those that were read.
    if (
        model.checkpoint is None
        and isinstance(last, ConversionRecord)
        and last.checkpoint is not None
        and any(files.get(name) != digest for name, digest in last.files.items())
    ):
        notes.append("its files are not those that the conversion before wrote: what happened between is not known")
    return before.with_event(
        ConversionRecord(
            after=len(before.phases),
            from_=model.format,
            to=to,
            name=model.path.name,
            checkpoint=model.checkpoint,
            files=files,
            notes=tuple(notes),
        )
    )
