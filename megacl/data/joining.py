"""What may join a data folder: who prepares into one is checked here, before the work and once more at its end."""

import os
from collections.abc import Sequence
from pathlib import Path

from megacl.data.generations import PREPARE_WORK, SHARD_NAME, FolderState, open_state
from megacl.data.inputs import STANDARD_INPUT
from megacl.data.manifest import MANIFEST, Generation, InputFile, TokenizerRecord, read_inputs
from megacl.data.shard_list import ShardList
from megacl.data.shards import token_dtype
from megacl.data.tasks import Command
from megacl.data.tokenizer import Tokenizer
from megacl.errors import DataError

MIN_HELD_OUT = 20
"""Held-out documents below which a validation loss says little."""


def open_folder(folder: Path, tokenizer: Tokenizer, source: str | None, validation: float) -> FolderState:
    """The folder's state; DataError if more data prepared like this cannot join it."""
    if not (folder / MANIFEST).exists():
        shards = [name for name in os.listdir(folder) if SHARD_NAME.fullmatch(name)]
        if shards and not (folder / PREPARE_WORK).exists():
            raise DataError(
                f"{folder}: it holds shards such as {shards[0]} but no {MANIFEST}. Restore that, or name another "
                "folder with --out."
            )
        return FolderState(
            folder=folder,
            source=source or folder.resolve().name,
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer=TokenizerRecord(
                file=tokenizer.file_name,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
            ),
            validation=validation,
            generations=(),
            shards=ShardList.concat([]),
        )
    state = open_state(folder)
    if state.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{folder}: its shards were made with another tokenizer than {tokenizer.file}. Give the folder's own, "
            f"--tokenizer {folder / state.tokenizer.file}, or name another folder with --out."
        )
    if state.validation != validation:
        raise DataError(
            f"{folder}: it was prepared with --validation {state.validation}, not {validation}. Give the same, or "
            "name another folder with --out."
        )
    if source is not None and state.source != source:
        raise DataError(
            f"{folder}: its source is called {state.source!r}, not {source!r}. Give the same name, or name another "
            "folder with --out."
        )
    return state


def made_already(
    state: FolderState, files: Sequence[InputFile], sizes: Sequence[tuple[str, int]], command: Command
) -> Generation | None:
    """The generation that this command would make, if there is one; DataError if the folder holds some of the files.

    files: all of the command's, or those of one of its tasks; sizes: (name, size) of all of the command's, in order.
    Files are known by their content, so that of a second name, a copy or a new date no document comes in twice. Nor
    does one of a file that grew or was mended since: a name that the folder has with other content is refused too.
    """
    if not state.number or not files:
        return None
    contents = {file.name: file.sha256 for file in files}
    inputs = read_inputs(state.folder, state.number)
    for generation in state.generations:
        own = [each for each in inputs if each.generation == generation.generation]
        same = [each.size for each in own] == [size for _, size in sizes] and all(
            contents.get(name, each.sha256) == each.sha256 for (name, _), each in zip(sizes, own, strict=True)
        )
        if same and command.settings.items() <= generation.settings.items():
            return generation
    held = {each.sha256: (each.generation, each.name) for each in inputs}
    names = {each.name: each.generation for each in inputs if each.name != STANDARD_INPUT}
    for file in files:  # before those that are held: "leave it out" is no answer to who gives all files again
        name = os.path.abspath(file.name)
        if name in names and file.sha256 not in held:
            raise DataError(
                f"{file.name}: generation {names[name]} of {state.folder} holds a file of this name with other "
                "content. Put only the new documents into a file with a name of its own, or prepare into a new folder "
                "with --out."
            )
    for file in files:
        if file.sha256 in held:
            number, name = held[file.sha256]
            alias = "" if name in (file.name, os.path.abspath(file.name)) else f", as {name}"
            raise DataError(
                f"{state.folder}: generation {number} holds {file.name} already{alias}. Leave it out, or name another "
                "folder with --out."
            )
    return None


def check_held_out(state: FolderState, added: ShardList) -> None:
    shards = ShardList.concat([state.current(), added])
    found = shards.totals("validation").documents
    documents = found + shards.totals("train").documents
    if state.validation > 0 and found < MIN_HELD_OUT:
        raise DataError(
            f"{state.folder}: {found} of {documents} documents are held out at --validation {state.validation:g}, and "
            f"a validation loss needs {MIN_HELD_OUT} or more. Give a larger fraction or more documents, or "
            "--validation 0 to hold out none."
        )
