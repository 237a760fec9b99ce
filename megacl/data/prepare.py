"""Raw documents -> tokenized shards, on all cores, restartable: `megacl prepare INPUT... --tokenizer MODEL --out DIR`.

    prepare(["raw/"], tokenizer=load_tokenizer("tokenizer.model"), out="data/english")

The inputs are cut into blocks (data/documents.py); a block becomes at most one train and one validation shard, written
by whichever worker has it; only counts come back. What a block becomes depends on nothing but its lines, the
tokenizer and the settings, so the folder's bytes do not depend on the number of workers.

Until the end everything lies in OUT/.prepare, and the same command goes on after an interruption (data/blocks.py). At
the end the shards move to OUT, and shards.arrow and manifest.json follow: a new generation, while readers of the
earlier ones see no change.

Held out for validation are the documents whose BLAKE2b hash (8 bytes of it, as a fraction of 2^64) lies below
`validation`: a function of the raw text alone, the same under every tokenizer, and copies of a document stay together.

Memory: at most 0.5 GB for each worker and a few blocks for the parent, whatever the size of the inputs.
"""

import contextlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megacl.data.blocks import Done, Recipe, prepare_blocks
from megacl.data.documents import BLOCK_BYTES, Inputs, cut_blocks, find_inputs, identify
from megacl.data.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    Generation,
    InputFile,
    Manifest,
    ShardList,
    ShardRow,
    TokenizerRecord,
    Totals,
    publish_manifest,
    read_inputs,
    read_manifest,
    read_shards,
)
from megacl.data.shards import token_dtype
from megacl.data.tokenizer import Tokenizer
from megacl.errors import ConfigError, DataError
from megacl.publish import alone_in, disk_errors, flush_folder

MIN_HELD_OUT = 20
"""Held-out documents below which a validation loss says little."""

_WORK_FOLDER = ".prepare"
_SHARD_NAME = re.compile(r"(train|validation)-\d{5,}\.arrow")


@dataclass(frozen=True)
class PrepareReport:
    """What a call of `prepare` added to a data folder."""

    generation: int
    documents: int  # held-out ones included
    tokens: int
    text_bytes: int
    held_out: int
    bad_lines: int
    empty_documents: int
    passed_over: tuple[str, ...]  # the files of other kinds in the folders that were searched
    seconds: float


def prepare(
    inputs: Sequence[str],
    *,
    tokenizer: Tokenizer,
    out: str | Path,
    source: str | None = None,
    validation: float = 0.01,
    field: str = "text",
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> PrepareReport:
    """Tokenizes raw documents into a data folder, as a new generation if the folder has one already.

    inputs: .jsonl, .jsonl.gz, .jsonl.zst files and folders of these, in which files of other kinds are
    passed over and named in the report. source: a name for the data; the folder's by
    default. validation: the part of the documents to hold out, in [0, 1). field: where a line has its text.
    skip_bad: leave out lines without a document, and count them, instead of stopping. workers: processes; by default
    one for each core that this process may use. progress: called with the bytes of input done and in all.
    block_bytes: input that becomes one shard. A command that has been carried out already does nothing; input files are
    known by their whole content, under any name, which is read once for that before all else.

    ConfigError: validation or workers out of range, source or field not UTF-8. DataError: the inputs, a line of them,
    the folder or the disk; fewer than 20 held-out documents in the whole folder. LaunchError: a worker was killed.
    Nothing is published then.
    """
    begun = time.monotonic()
    if not 0 <= validation < 1:
        raise ConfigError(f"validation is {validation}; it must lie in [0, 1). It is the part of documents held out.")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or more. It is the number of processes.")
    folder = Path(out)
    found = find_inputs(inputs)
    workers = workers or _cores()
    recipe = Recipe(tokenizer.file, tokenizer.fingerprint, validation, field, skip_bad)
    with alone_in(folder, "another prepare"):
        manifest = _open_folder(folder, tokenizer, source, validation)
        source = manifest.source if manifest else source or folder.resolve().name
        _check_recordable(source=source, field=field)
        files = identify(found.files, workers)
        if manifest and (made := _made_already(folder, manifest, files, field)):
            _clear_work(folder)
            return _report(manifest, made, found, time.monotonic() - begun)
        total = sum(file.size for file in files)
        done = prepare_blocks(
            cut_blocks(found.files, block_bytes),
            files,
            recipe,
            folder / _WORK_FOLDER,
            workers,
            progress and (lambda bytes_done: progress(bytes_done, total)),
        )
        manifest = _publish(folder, manifest, done, files, recipe, tokenizer, source)
        _clear_work(folder)
    return _report(manifest, manifest.generations[-1], found, time.monotonic() - begun)


def _check_recordable(**settings: str) -> None:
    for name, value in settings.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{name} is {value!r}, which is not UTF-8, so it cannot be recorded. Give another with --{name}."
            ) from None


def _cores() -> int:
    # Under SLURM a process may use fewer cores than the machine has; macOS cannot say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(manifest: Manifest, state: Generation, found: Inputs, seconds: float) -> PrepareReport:
    """What a generation added."""
    zero = Totals(documents=0, tokens=0, text_bytes=0)
    before = manifest.generations[state.generation - 2] if state.generation > 1 else None
    train_before, held_out_before = (before.train, before.validation) if before else (zero, zero)
    train, held_out = state.train, state.validation
    return PrepareReport(
        generation=state.generation,
        documents=train.documents + held_out.documents - train_before.documents - held_out_before.documents,
        tokens=train.tokens + held_out.tokens - train_before.tokens - held_out_before.tokens,
        text_bytes=train.text_bytes + held_out.text_bytes - train_before.text_bytes - held_out_before.text_bytes,
        held_out=held_out.documents - held_out_before.documents,
        bad_lines=state.bad_lines,
        empty_documents=state.empty_documents,
        passed_over=found.passed_over,
        seconds=seconds,
    )


# ---------------------------------------------------------------------------------------------- the data folder


def _open_folder(folder: Path, tokenizer: Tokenizer, source: str | None, validation: float) -> Manifest | None:
    """The folder's manifest, None if it has none yet; DataError if more data prepared like this cannot join it."""
    if not (folder / MANIFEST).exists():
        shards = [name for name in os.listdir(folder) if _SHARD_NAME.fullmatch(name)]
        if shards and not (folder / _WORK_FOLDER).exists():
            raise DataError(
                f"{folder}: it holds shards such as {shards[0]} but no {MANIFEST}. Restore that, or name another "
                "folder with --out."
            )
        return None
    manifest = read_manifest(folder)
    if manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{folder}: its shards were made with another tokenizer than {tokenizer.file}. Give the folder's own, "
            f"--tokenizer {folder / manifest.tokenizer.file}, or name another folder with --out."
        )
    if manifest.validation != validation:
        raise DataError(
            f"{folder}: it was prepared with --validation {manifest.validation}, not {validation}. Give the same, or "
            "name another folder with --out."
        )
    if source is not None and manifest.source != source:
        raise DataError(
            f"{folder}: its source is called {manifest.source!r}, not {source!r}. Give the same name, or name another "
            "folder with --out."
        )
    return manifest


def _made_already(folder: Path, manifest: Manifest, files: Sequence[InputFile], field: str) -> Generation | None:
    """The generation that this command would make, if there is one; DataError if the folder holds some of the files.

    Files are known by their content, so that of a second name, a copy or a new date no document comes in twice. Nor
    does one of a file that grew or was mended since: a name that the folder has with other content is refused too.
    """
    contents = [file.sha256 for file in files]
    inputs = read_inputs(folder, len(manifest.generations))
    for state in manifest.generations:
        own = [each.sha256 for each in inputs if each.generation == state.generation]
        if own == contents and state.settings["field"] == field:
            return state
    held = {each.sha256: (each.generation, each.name) for each in inputs}
    names = {os.path.abspath(each.name): each.generation for each in inputs}
    for file in files:  # before those that are held: "leave it out" is no answer to who gives all files again
        name = os.path.abspath(file.name)
        if name in names and file.sha256 not in held:
            raise DataError(
                f"{file.name}: generation {names[name]} of {folder} holds a file of this name with other content. Put "
                "only the new documents into a file with a name of its own, or prepare into a new folder with --out."
            )
    for file in files:
        if file.sha256 in held:
            generation, name = held[file.sha256]
            alias = "" if name == file.name else f", as {name}"
            raise DataError(
                f"{folder}: generation {generation} holds {file.name} already{alias}. Leave it out, or name another "
                "folder with --out."
            )
    return None


def _clear_work(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / _WORK_FOLDER)


def _publish(
    folder: Path,
    manifest: Manifest | None,
    done: Sequence[Done],
    files: Sequence[InputFile],
    recipe: Recipe,
    tokenizer: Tokenizer,
    source: str,
) -> Manifest:
    """Moves the shards out of the work folder and publishes the generation that they make."""
    generations = manifest.generations if manifest else ()
    number = len(generations) + 1
    held = list(read_shards(folder).until(number - 1)) if generations else []
    added = [row for each in done for row in each.rows]
    bad_lines, empty = sum(each.bad_lines for each in done), sum(each.empty_documents for each in done)
    if not added:
        raise DataError(
            f"{files[0].name}{' and the other inputs' if len(files) > 1 else ''}: no documents in there "
            f"({bad_lines} bad lines, {empty} documents without text). Check the files and --field."
        )
    _check_held_out(folder, [*held, *added], recipe.validation)
    shards = ShardList.of_rows([*held, *_move_shards(folder, held, added, number)])
    dtype = token_dtype(tokenizer.vocab_size)
    rows = shards.at(number)
    state = Generation(
        generation=number,
        shards=len(rows),
        train=rows.totals("train"),
        validation=rows.totals("validation"),
        fingerprint=rows.fingerprint(tokenizer.fingerprint, dtype),
        made_by="prepare",
        settings={"field": recipe.field},
        bad_lines=bad_lines,
        empty_documents=empty,
    )
    record = TokenizerRecord(
        file=tokenizer.save(folder).name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    published = Manifest(
        format=FORMAT,
        version=VERSION,
        source=source,
        dtype=dtype,
        tokenizer=record,
        validation=recipe.validation,
        generations=(*generations, state),
    )
    inputs = read_inputs(folder, number - 1) if generations else ()
    publish_manifest(folder, published, shards, [*inputs, *(replace(each, generation=number) for each in files)])
    return published


def _check_held_out(folder: Path, rows: Sequence[ShardRow], validation: float) -> None:
    found = sum(row.documents for row in rows if row.split == "validation")
    documents = sum(row.documents for row in rows)
    if validation > 0 and found < MIN_HELD_OUT:
        raise DataError(
            f"{folder}: {found} of {documents} documents are held out at --validation {validation:g}, and a "
            f"validation loss needs {MIN_HELD_OUT} or more. Give a larger fraction or more documents, or "
            "--validation 0 to hold out none."
        )


def _move_shards(folder: Path, held: Sequence[ShardRow], added: Sequence[ShardRow], generation: int) -> list[ShardRow]:
    """Moves the added shards from the work folder to their places behind those held, and returns their new rows."""
    counts = Counter(row.split for row in held)
    moved = []
    for row in added:
        moved.append(replace(row, path=f"{row.split}-{counts[row.split]:05d}.arrow", added=generation))
        counts[row.split] += 1
    listed = {row.path for row in (*held, *moved)}
    with disk_errors(folder, "the shards"):
        for before, after in zip(added, moved, strict=True):
            os.replace(folder / _WORK_FOLDER / before.path, folder / after.path)
        for name in os.listdir(folder):
            if _SHARD_NAME.fullmatch(name) and name not in listed:
                os.unlink(folder / name)  # moved here by a command that was killed before it published its manifest
        flush_folder(folder)
    return moved
