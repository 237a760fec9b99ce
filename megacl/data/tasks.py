"""The tasks of one prepare, in a folder that they share: each does its portions of the inputs and leaves a record.

WORK holds the shards and results of blocks (data/blocks.py); a folder `command` with `command.json`, which says what is
being prepared and how, and a copy of the tokenizer; and for each task a folder `task-3-of-8` with `shards.arrow`, the
rows of its shards, portion by portion, and, written last, `record.json`: its input files, and how many of the rows each
portion has. Tasks hold no lock against one another: they write under names of their own. A merge publishes the command
that began last.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megacl.data.blocks import Recipe, prepare_blocks
from megacl.data.documents import Block, cut_portions_ahead
from megacl.data.forms import RawFile, measure
from megacl.data.inputs import STANDARD_INPUT
from megacl.data.manifest import InputFile
from megacl.data.portions import cut_portions, portions_of_task
from megacl.data.shard_list import SHARDS, ShardList, parse_shards
from megacl.data.tokenizer import Tokenizer
from megacl.errors import DataError
from megacl.publish import publish_bytes, publish_text

COMMAND_FOLDER = "command"
_COMMAND, _RECORD = "command.json", "record.json"


@dataclass(frozen=True)
class Command:
    """What is being prepared and how: the same for all of its tasks, and all that merging them needs."""

    tasks: int
    source: str
    tokenizer_file: str
    """Its copy, beside the command."""
    tokenizer_fingerprint: str
    validation: float
    settings: dict[str, str | int | float | bool]
    """For the generation's record."""
    skip_bad: bool
    block_bytes: int
    dedup: bool
    against: tuple[str, ...]
    """Other data folders, absolute, whose documents are left out too."""
    inputs: str
    """SHA-256 of the names and sizes of all input files, in order."""

    @property
    def digest(self) -> str:
        """A hash of all this."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def digest_of_files(files: Sequence[RawFile]) -> str:
    """What `Command.inputs` holds of the files that were found."""
    return sha256(json.dumps([(file.name, file.size) for file in files]).encode()).hexdigest()


@dataclass(frozen=True)
class TaskFile:
    """An input file as a task read it."""

    portion: int
    name: str
    paths: tuple[str, ...]  # absolute, so that a merge may run in another folder
    size: int
    modified_ns: int
    sha256: str

    @property
    def recorded(self) -> InputFile:
        """What a manifest records of it: the name absolute, so that it says the same wherever the next command runs."""
        name = self.name if self.name == STANDARD_INPUT else self.paths[0]
        return InputFile(name=name, size=self.size, sha256=self.sha256)


@dataclass(frozen=True)
class TaskRecord:
    """What a task has done."""

    command: str  # digest
    files: tuple[TaskFile, ...]
    portions: tuple[tuple[int, int], ...]  # (number, rows) of each of its portions, in the order of its rows
    bad_lines: int
    empty_documents: int
    passed_over: tuple[str, ...]  # files of other kinds that it met; they may differ from task to task

    def changed_file(self) -> str | None:
        """The name of a file that is not what the task read any more, by its size and time of change, or None."""
        for file in self.files:
            try:
                changed = measure(file.paths) != (file.size, file.modified_ns)
            except OSError:
                changed = True
            if changed:
                return file.name
        return None


_COMMANDS, _RECORDS = TypeAdapter(Command), TypeAdapter(TaskRecord)


def check_nothing_lost(command: Command, files: Sequence[RawFile], work: Path) -> None:
    """DataError if tasks of another command have done a file that this one, whose files these are, does not have.

    Publishing a command clears the work folder. Another command with the same files, cut otherwise or mended, is what
    the earlier one was to become.
    """
    waiting = read_command(work)
    if waiting is None or waiting.tasks == 1 or waiting == command:
        return
    given = {os.path.abspath(path) for file in files for path in file.paths}
    for task in range(1, waiting.tasks + 1):
        done = read_task(waiting, work, task)
        for file in done[0].files if done else ():
            if not given.issuperset(file.paths):
                raise DataError(
                    f"{work.parent}: tasks of another prepare wait there for `megacl data merge {work.parent}`, and "
                    f"they did {file.name}, which this one does not have. Merge them first, or delete {work}."
                )


def begin_command(command: Command, files: Sequence[RawFile], tokenizer: Tokenizer, work: Path) -> None:
    """Makes the command the one that the next merge publishes. DataError as for check_nothing_lost."""
    folder = work / COMMAND_FOLDER
    if read_command(work) != command:
        check_nothing_lost(command, files, work)
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        publish_text(folder / _COMMAND, str(_COMMANDS.dump_json(command), "utf-8"), "the command")


def read_command(work: Path) -> Command | None:
    """The command whose tasks are being done in a work folder, or None."""
    try:
        return _COMMANDS.validate_json((work / COMMAND_FOLDER / _COMMAND).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def folder_of_task(work: Path, task: int, tasks: int) -> Path:
    """Where a task leaves its record."""
    return work / f"task-{task}-of-{tasks}"


def read_task(command: Command, work: Path, task: int) -> tuple[TaskRecord, ShardList] | None:
    """What a task has done for this command, and the rows of its shards; None if it is not done."""
    folder = folder_of_task(work, task, command.tasks)
    try:
        record = _RECORDS.validate_json((folder / _RECORD).read_bytes())
        shards = (folder / SHARDS).read_bytes()
    except (FileNotFoundError, ValidationError):
        return None
    return (record, parse_shards(shards, folder / SHARDS)) if record.command == command.digest else None


def files_of_task(command: Command, files: Sequence[RawFile], task: int) -> dict[int, tuple[RawFile, ...]]:
    """The portions that a task does, by their numbers."""
    portions = cut_portions(files, command.block_bytes)
    return {number: portions[number] for number in portions_of_task(portions, task, command.tasks)}


def run_task(
    command: Command,
    portions: dict[int, tuple[RawFile, ...]],
    inputs: Sequence[InputFile],
    passed_over: tuple[str, ...],
    recipe: Recipe,
    work: Path,
    task: int,
    workers: int,
    progress: Callable[[int], None] | None,
) -> tuple[TaskRecord, ShardList]:
    """Does a task and leaves its record in its folder, which exists.

    inputs: the files of its portions, in order, as they were identified. Raises what prepare_blocks raises.
    """
    blocks = dict.fromkeys(portions, 0)

    def cut() -> Iterator[Block]:
        at_once = workers // 2  # a worker alone does everything in its own time
        for number, block in cut_portions_ahead(portions, recipe.reading, command.block_bytes, at_once):
            blocks[number] += 1
            yield block

    done = prepare_blocks(cut(), inputs, recipe, work, workers, progress)
    of_portion = np.repeat(list(blocks), list(blocks.values())).tolist()
    rows = dict.fromkeys(portions, 0)
    for number, each in zip(of_portion, done, strict=True):
        rows[number] += len(each.rows)
    numbered = [(number, file) for number, portion in portions.items() for file in portion]
    record = TaskRecord(
        command=command.digest,
        files=tuple(
            TaskFile(
                number,
                file.name,
                tuple(map(os.path.abspath, file.paths)),
                file.size,
                file.modified_ns,
                known.sha256,
            )
            for (number, file), known in zip(numbered, inputs, strict=True)
        ),
        portions=tuple(rows.items()),
        bad_lines=sum(each.bad_lines for each in done),
        empty_documents=sum(each.empty_documents for each in done),
        passed_over=passed_over,
    )
    shards = ShardList.of_rows(list(chain.from_iterable(each.rows for each in done)))
    folder = folder_of_task(work, task, command.tasks)
    publish_bytes(folder / SHARDS, shards.dump(), "the task's shards")
    publish_text(folder / _RECORD, str(_RECORDS.dump_json(record), "utf-8"), "the task's record")
    return record, shards


@dataclass(frozen=True)
class AllTasks:
    """What the tasks of a command have done together, in the order of the inputs."""

    files: tuple[TaskFile, ...]
    shards: ShardList
    bad_lines: int
    empty_documents: int
    passed_over: tuple[str, ...]


def gather_tasks(command: Command, work: Path) -> AllTasks:
    """Puts the tasks' results together. DataError if a task is not done, or an input changed since it was read."""
    found = {task: read_task(command, work, task) for task in range(1, command.tasks + 1)}
    missing = [task for task, each in found.items() if each is None]
    if missing and command.tasks == 1:
        raise DataError(f"{work.parent}: a prepare there was interrupted, and is not done. Run the same command again.")
    if missing:
        names = ", ".join(f"{task}/{command.tasks}" for task in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{work.parent}: task {names}{more} {'is' if len(missing) == 1 else 'are'} not done. Run the same prepare "
            f"with --task {missing[0]}/{command.tasks}{' and the others' if len(missing) > 1 else ''}, then merge."
        )
    done = [each for each in found.values() if each is not None]
    for task, (record, shards) in enumerate(done, 1):
        for path in shards.paths():
            if not (work / path).exists():
                raise DataError(
                    f"{work / path}: a shard that task {task}/{command.tasks} wrote is gone. Delete "
                    f"{folder_of_task(work, task, command.tasks)} and run that task again."
                )
        if name := record.changed_file():
            raise DataError(
                f"{name}: the file changed or went since task {task}/{command.tasks} read it. Run that task again, "
                "then merge."
            )
    files = sorted((file for record, _ in done for file in record.files), key=lambda file: file.portion)
    numbers = np.array([pair for record, _ in done for pair in record.portions], np.int64).reshape(-1, 2)
    shards = ShardList.concat([shards for _, shards in done])
    return AllTasks(
        files=tuple(files),
        shards=shards.take(np.argsort(np.repeat(numbers[:, 0], numbers[:, 1]), kind="stable")),
        bad_lines=sum(record.bad_lines for record, _ in done),
        empty_documents=sum(record.empty_documents for record, _ in done),
        passed_over=tuple(dict.fromkeys(chain.from_iterable(record.passed_over for record, _ in done))),
    )
