"""The next generation of a data folder: how it is put together, and published so that a kill in between does no harm.

    state = open_state(Path("data/english"))
    publish_generation(state, work, Change(made_by="prepare", settings={}, added=rows))

Everything that the folder is to become is written to WORK/next first: the new lists, the new manifest, and which files
move where. From then on the generation has happened: whichever command comes next finishes it, however often it is
killed. Moving is renaming, a few microseconds a shard.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacl.data.manifest import (
    FORMAT,
    INPUTS,
    MANIFEST,
    REMOVED,
    VERSION,
    Generation,
    Hashes,
    InputFile,
    MadeBy,
    Manifest,
    TokenizerRecord,
    no_manifest,
    parse_manifest,
    publish_manifest,
    read_inputs,
    read_manifest,
    read_removed,
)
from megacl.data.shard_list import SHARDS, DTypeName, ShardList, Split, parse_shards, read_shards
from megacl.errors import DataError
from megacl.publish import (
    alone_in,
    delete_folder,
    disk_errors,
    flush_folder,
    publish_bytes,
    publish_folder,
    publish_text,
    sweep_unfinished,
)

PREPARE_WORK, CHANGE_WORK = ".prepare", ".change"
"""Work folders in a data folder: of prepare and its tasks, and of commands that change what is there."""

SHARD_NAME = re.compile(r"(train|validation)-\d{5,}\.arrow")
_NEXT, _MOVES = "next", "moves.json"


@dataclass(frozen=True)
class FolderState:
    """A data folder as it stands: what its next generation builds on."""

    folder: Path
    source: str
    dtype: DTypeName
    tokenizer: TokenizerRecord
    validation: float
    generations: tuple[Generation, ...]
    shards: ShardList
    """The rows of all generations, those that went included."""

    @property
    def number(self) -> int:
        """The newest generation; 0 where there is none."""
        return len(self.generations)

    def current(self) -> ShardList:
        """The rows of the newest generation."""
        return self.shards.at(self.number)

    def manifest(self, *generations: Generation) -> Manifest:
        """The content of manifest.json with these generations."""
        return Manifest(
            format=FORMAT,
            version=VERSION,
            source=self.source,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            validation=self.validation,
            generations=generations,
        )


def open_state(folder: Path) -> FolderState:
    """The state of a folder that has a manifest. DataError if a file of it is missing or damaged."""
    manifest = read_manifest(folder)
    return FolderState(
        folder=folder,
        source=manifest.source,
        dtype=manifest.dtype,
        tokenizer=manifest.tokenizer,
        validation=manifest.validation,
        generations=manifest.generations,
        shards=read_shards(folder).until(len(manifest.generations)),
    )


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[FolderState]:
    """The state of a folder that nobody else changes meanwhile, with CHANGE_WORK there to work in.

    DataError if it is no data folder, or another command is at work there.
    """
    if not (folder / MANIFEST).exists() and not is_interrupted(folder):
        raise no_manifest(folder)
    with alone_in(folder, "another command"):
        finish_interrupted(folder)
        state = open_state(folder)
        with disk_errors(folder / CHANGE_WORK, "the work folder"):
            (folder / CHANGE_WORK).mkdir(exist_ok=True)
        yield state
        delete_folder(folder / CHANGE_WORK)


@dataclass(frozen=True)
class Change:
    """What makes the next generation out of the newest one."""

    made_by: MadeBy
    settings: Mapping[str, str | int | float | bool]
    added: ShardList
    """Shards that come, in order, their paths relative to the work folder; what came twice may lie there once."""
    going: npt.NDArray[np.bool_] | None = None
    """Which rows of the folder go: bool [rows of all generations]; None: none does."""
    inputs: Sequence[InputFile] = ()
    removed: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    """Documents that are never to come back."""
    bad_lines: int = 0
    empty_documents: int = 0
    removed_documents: int = 0
    purged: npt.NDArray[np.bool_] | None = None
    """Of which rows that are not of the next generation the files are deleted: bool [rows of all generations]."""


def publish_generation(state: FolderState, work: Path, change: Change) -> Generation:
    """Publishes the generation that a change makes, and clears the work folder. DataError if the disk refuses."""
    number = state.number + 1
    held = state.shards
    if change.going is not None:
        held = held.replaced(removed=np.where(change.going, number, held.numbers("removed")))
    files = _each_its_own(work, change.added.paths())
    added = change.added.replaced(path=_new_names(held, change.added), added=number, removed=0)
    shards = ShardList.concat([held, added])
    rows = shards.at(number)
    if not len(rows):
        raise DataError(f"{state.folder}: no document would be left. Delete the folder instead.")
    generation = Generation(
        generation=number,
        shards=len(rows),
        train=rows.totals("train"),
        validation=rows.totals("validation"),
        fingerprint=rows.fingerprint(state.tokenizer.fingerprint, state.dtype),
        made_by=change.made_by,
        settings=dict(change.settings),
        bad_lines=change.bad_lines,
        empty_documents=change.empty_documents,
        removed_documents=change.removed_documents,
    )
    purged = np.zeros(len(state.shards), np.bool_) if change.purged is None else change.purged
    lost = {each.generation for each in state.generations if (purged & state.shards.is_at(each.generation)).any()}
    earlier = (replace(each, purged_by=number) if each.generation in lost else each for each in state.generations)
    inputs = read_inputs(state.folder, state.number) if state.number else ()
    removed = read_removed(state.folder, state.generations).and_also(change.removed, number)
    with publish_folder(work / _NEXT, "the next generation") as planned:
        new_inputs = (replace(each, generation=number) for each in change.inputs)
        publish_manifest(planned, state.manifest(*earlier, generation), shards, [*inputs, *new_inputs], removed)
        moves = list(zip(files, added.paths(), strict=True))
        tree = {"moves": moves, "purged": state.shards.where(purged).paths()}
        publish_text(planned / _MOVES, json.dumps(tree), "the list of moves")
    _finish(state.folder, work)
    return generation


def _each_its_own(work: Path, paths: Sequence[str]) -> list[str]:
    """The files in the work folder, each once: of one that is given several times there are copies in its places.

    Files there are named by their content, so equal inputs share one.
    """
    given: set[str] = set()
    files = []
    for number, path in enumerate(paths):
        files.append(f"{number}-{path}" if path in given else path)
        if path in given:
            publish_bytes(work / files[-1], (work / path).read_bytes(), "a shard")
        given.add(path)
    return files


def _new_names(held: ShardList, added: ShardList) -> list[str]:
    """Names of the added shards, numbered on from those that the folder has ever had, in each split."""
    held_out = added.held_out()
    names = np.empty(len(added), object)
    splits: tuple[Split, Split] = ("train", "validation")
    for split, chosen in zip(splits, (~held_out, held_out), strict=True):
        first = len(held.split(split))
        names[chosen] = [f"{split}-{first + index:05d}.arrow" for index in range(int(chosen.sum()))]
    return list(names)


def is_interrupted(folder: Path) -> bool:
    """Whether a command was killed while it published, and what it published is to be finished."""
    return any((folder / name / _NEXT).exists() for name in (PREPARE_WORK, CHANGE_WORK))


def finish_interrupted(folder: Path) -> None:
    """Publishes what a command that was killed had got as far as publishing, and deletes what it was at.

    For who is alone in the folder.
    """
    for name in (PREPARE_WORK, CHANGE_WORK):
        if (folder / name / _NEXT).exists():
            _finish(folder, folder / name)
    for each in (folder, folder / PREPARE_WORK, folder / CHANGE_WORK):
        sweep_unfinished(each)


def _finish(folder: Path, work: Path) -> None:
    """Brings what WORK/next describes about, as far as it is not done yet, and clears the work folder."""
    planned = work / _NEXT
    with disk_errors(folder, "the next generation"):
        if (planned / MANIFEST).exists():
            _move_shards(folder, work)
            for name in (INPUTS, REMOVED, SHARDS, MANIFEST):  # the manifest last: it makes the others count
                with contextlib.suppress(FileNotFoundError):  # moved before a kill
                    os.replace(planned / name, folder / name)
                flush_folder(folder)
        for name in _planned_moves(planned)["purged"]:
            (folder / name).unlink(missing_ok=True)
        flush_folder(folder)
        delete_folder(work)


def _planned_moves(planned: Path) -> dict[str, list[Any]]:
    """ "moves": [name in the work folder, name in the data folder] of each new shard; "purged": files to delete."""
    found: dict[str, list[Any]] = json.loads((planned / _MOVES).read_bytes())
    return found


def _move_shards(folder: Path, work: Path) -> None:
    planned = work / _NEXT
    for before, after in _planned_moves(planned)["moves"]:
        try:
            os.replace(work / before, folder / after)
        except FileNotFoundError:
            if not (folder / after).exists():  # else it was moved before a kill
                raise DataError(
                    f"{work / before}: the shard was to be published as {after}, and is gone. Delete {work} and run "
                    "the command again."
                ) from None
    number = len(parse_manifest((planned / MANIFEST).read_bytes(), planned / MANIFEST).generations)
    listed = planned / SHARDS if (planned / SHARDS).exists() else folder / SHARDS
    paths = set(parse_shards(listed.read_bytes(), listed).until(number).paths())
    for name in os.listdir(folder):
        if SHARD_NAME.fullmatch(name) and name not in paths:
            os.unlink(folder / name)  # of a generation that was never published
    flush_folder(folder)
